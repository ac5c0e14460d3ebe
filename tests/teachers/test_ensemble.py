"""Several teachers as one: the mean of probabilities, exact over the vocabulary, however the chunks fall."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers_toys import VOCAB, save_toy

from lmdistill.checkpoints import load_model
from lmdistill.errors import PreflightError, StageError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.chunks import reduce_chunks
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.ensemble import EnsembleEngine, check_ensemble, mean_chunks, mean_log_probs, normalised
from lmdistill.teachers.registry import ENGINES, create_engine

K, LENGTH = 6, 30
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
STARTS = np.zeros(TOKENS.shape, bool)
STARTS[:, [0, 11]] = True
OPTIONS = EngineOptions(K, VOCAB, row_tokens=LENGTH, threads=1)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    """Three teachers that disagree."""
    return [save_toy(tmp_path_factory.mktemp(f"toy{seed}"), seed=seed) for seed in range(3)]


@cache
def probabilities(teacher: ModelRef) -> torch.Tensor:
    with torch.inference_mode():
        logits = load_model(teacher.path)(torch.from_numpy(TOKENS).long()).logits[..., :VOCAB]
    return logits.double().softmax(-1)


def scored(teachers, weights=(), **options):
    engine = EnsembleEngine("transformers", teachers[1:], weights)
    engine.open(teachers[0], EngineOptions(**(vars(OPTIONS) | options)))
    return engine.score(TOKENS, STARTS)


def assert_close(one, other, atol=2e-6):
    np.testing.assert_allclose(np.exp(one.logp_BTK), np.exp(other.logp_BTK), atol=atol)
    np.testing.assert_allclose(np.exp(one.tail_BT), np.exp(other.tail_BT), atol=atol)
    np.testing.assert_allclose(np.exp(one.lp_next_BT), np.exp(other.lp_next_BT), atol=atol)


def assert_is(found, mean):
    """`found` holds the top K, the tail and the next token's probability of the distributions `mean`."""
    best = mean.topk(K).values
    np.testing.assert_allclose(np.exp(found.logp_BTK), best, atol=2e-6)
    np.testing.assert_allclose(mean.gather(2, torch.from_numpy(found.ids_BTK).long()), best, atol=2e-6)
    np.testing.assert_allclose(np.exp(found.tail_BT), 1 - best.sum(-1), atol=2e-6)
    np.testing.assert_allclose(np.exp(found.logp_BTK).sum(-1) + np.exp(found.tail_BT), 1, atol=1e-5)
    following = torch.from_numpy(TOKENS[:, 1:, None]).long()
    np.testing.assert_allclose(np.exp(found.lp_next_BT[:, :-1]), mean[:, :-1].gather(2, following)[..., 0], atol=2e-6)
    assert np.isnan(found.lp_next_BT[:, -1]).all()


def test_it_is_the_mean_of_probabilities(toys):
    """Equal to the direct computation in float64: head, tail and next token; head + tail = 1."""
    assert_is(scored(toys[:2]), (probabilities(toys[0]) + probabilities(toys[1])) / 2)
    weights = (1.0, 2.0, 5.0)
    mean = sum(w * probabilities(toy) for w, toy in zip(weights, toys, strict=True)) / 8
    assert_is(scored(toys, weights), mean)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_of_one_teacher_are_that_teacher(toys, copies):
    """To float tolerance, isolated documents included."""
    for isolate in (False, True):
        plain = create_engine("transformers")
        plain.open(toys[0], EngineOptions(**(vars(OPTIONS) | {"isolate": isolate})))
        assert_close(scored([toys[0]] * copies, isolate=isolate), plain.score(TOKENS, STARTS))


def test_the_members_order_does_not_matter(toys):
    """To float tolerance, weights going with their teachers."""
    forth = scored(toys, (1.0, 2.0, 5.0))
    assert_close(scored(toys[::-1], (5.0, 2.0, 1.0)), forth)
    assert_close(scored([toys[1], toys[0], toys[2]], (2.0, 1.0, 5.0)), forth)


def test_gguf_teachers_are_averaged_too(gguf_toy):
    """Through llama.cpp's own logits, whose memory the next chunk reuses."""
    teachers = [gguf_toy("q4_1"), gguf_toy("f32")]
    options = EngineOptions(K, 49152, row_tokens=LENGTH, threads=1, isolate=True)
    ensemble = EnsembleEngine("llama_cpp", teachers[1:], ())
    ensemble.open(teachers[0], options)
    found = ensemble.score(TOKENS, STARTS)
    lp_next = []
    for teacher in teachers:
        engine = create_engine("llama_cpp")
        engine.open(teacher, options)
        lp_next.append(np.exp(engine.score(TOKENS, STARTS).lp_next_BT))
    np.testing.assert_allclose(np.exp(found.lp_next_BT), np.mean(lp_next, axis=0), rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 200), members=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_where_the_chunks_are_cut_changes_nothing(data, tokens, members, seed):
    """Streams of any chunk sizes give the mean of the whole, with head + tail = 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(tokens, 40, generator=generator) * 4 for _ in range(members)]
    weights = normalised(data.draw(st.lists(st.floats(0.1, 9), min_size=members, max_size=members)), members)
    streams = []
    for one in logits:
        cuts = sorted(data.draw(st.sets(st.integers(1, tokens), max_size=5)) | {0, tokens})
        streams.append(iter([(a, one[a:b]) for a, b in pairwise(cuts)]))
    ids = np.random.default_rng(seed).integers(0, 40, (1, tokens)).astype(np.int32)
    found = reduce_chunks(mean_chunks(streams, weights), ids, 5)
    mean = sum(w * one.double().softmax(-1) for w, one in zip(weights, logits, strict=True))
    np.testing.assert_allclose(np.exp(found.logp_BTK[0]), mean.topk(5).values, atol=1e-6)
    np.testing.assert_allclose(np.exp(found.logp_BTK).sum(-1) + np.exp(found.tail_BT), 1, atol=1e-5)


def test_probabilities_too_small_for_float32_are_kept():
    """The mean never leaves the log domain: e^-200 beside e^-300 stays e^-200 halved, not zero."""
    logits = [torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -300.0]])]
    assert mean_log_probs(logits, (0.5, 0.5))[0, 1] == pytest.approx(-200 - np.log(2))


def test_members_that_score_other_numbers_of_tokens_are_refused():
    """Nothing is averaged with what is not there."""
    streams = [iter([(0, torch.zeros(4, 8))]), iter([(0, torch.zeros(3, 8))])]
    with pytest.raises(StageError, match="different numbers of tokens"):
        list(mean_chunks(streams, (0.5, 0.5)))


def test_engines_that_tell_their_top_k_only_are_refused():
    """The mean's top K may lie outside of every member's."""
    able = {name for name, entry in ENGINES.items() if entry.logits}
    assert {"transformers", "llama_cpp"} == able
    for name in ENGINES.keys() - able:
        with pytest.raises(PreflightError, match="cannot run an ensemble") as refused:
            check_ensemble(name)
        assert "use one of: llama_cpp, transformers" in refused.value.fix
