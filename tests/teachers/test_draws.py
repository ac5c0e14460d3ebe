"""Drawing ids: the right distribution, the same bytes however rows are cut, what a row is worth.

Axes: N tokens, V vocabulary, n draws, K entries.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import PreflightError
from lmdistill.signals.sampling import Sampling
from lmdistill.teachers.draws import check_draws, draw, draw_chunks

PINNED = [
    0.029532224961905735,
    0.37062690004967164,
    0.9622051658310822,
    0.19190532640698751,
    0.4344081818366587,
    0.8717926128553448,
]
CASES = st.tuples(st.integers(0, 10_000), st.integers(2, 300), st.integers(1, 40), st.sampled_from([0.5, 1.0, 1.4]))


def _logits(seed: int, tokens: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_what_is_drawn_adds_up_and_says_what_the_teacher_says(case):
    """Counts sum to n, ids are distinct and sorted by log-prob, log-probs and z are exact, pads repeat the first."""
    seed, vocab, draws, temperature = case
    logits_NV = _logits(seed, 5, vocab)
    uniforms = torch.from_numpy(Sampling(draws, temperature, seed).uniforms("train", 0, 1, 5)[0])
    next_N = torch.randint(vocab, (5,), generator=torch.Generator().manual_seed(seed))
    ids, logp, counts, log_z, outside, lp_next = draw(logits_NV, uniforms, next_N, temperature)
    exact_NV = logits_NV.double().log_softmax(-1)
    there = counts > 0
    assert (counts.sum(1) == draws).all()
    assert (logp.diff(dim=1) <= 0)[there[:, 1:]].all()
    assert (ids == ids[:, :1])[~there].all() and torch.isneginf(logp[~there]).all()
    assert all(len(set(row[keep].tolist())) == keep.sum() for row, keep in zip(ids, there, strict=True))
    torch.testing.assert_close(logp[there].double(), exact_NV.gather(1, ids.long())[there], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_z.double(), (temperature * exact_NV).logsumexp(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lp_next.double(), exact_NV.gather(1, next_N[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    held = logp.double().exp().sum(1) + outside.double().exp()
    torch.testing.assert_close(held, torch.ones_like(held), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_each_draw_is_where_the_cumulative_proposal_crosses_its_uniform(case):
    """Against a plain search in the whole cumulative sum in float64, but for crossings within rounding."""
    seed, vocab, draws, temperature = case
    logits_NV = _logits(seed, 4, vocab)
    uniforms = torch.from_numpy(Sampling(draws, temperature, seed).uniforms("valid", 3, 1, 4)[0])
    ids, _, counts, *_ = draw(logits_NV, uniforms, torch.zeros(4, dtype=torch.long), temperature)
    below = (temperature * logits_NV.double()).softmax(-1).cumsum(-1)
    near = (below[:, None] - uniforms[..., None]).abs().amin(-1) < 1e-5
    expected = torch.searchsorted(below, uniforms, right=True)
    for row in range(4):
        found = sorted(i for i, c in zip(ids[row].tolist(), counts[row].tolist(), strict=True) for _ in range(c))
        assert all(a == b for a, b, close in zip(found, expected[row].tolist(), near[row], strict=True) if not close)


def test_an_id_of_no_mass_is_never_drawn_and_one_of_two_nths_always():
    """Logits of −inf at the ends and inside; an id with 2/n of the mass comes at every seed, wherever it stands."""
    logits = torch.full((1, 130), -torch.inf)
    logits[0, [3, 64, 127]] = torch.tensor([0.8, 0.1, 0.1]).log()
    for seed in range(200):
        uniforms = torch.from_numpy(Sampling(20, seed=seed).uniforms("train", 0, 1, 1)[0])
        ids, _, counts, *_ = draw(logits, uniforms, torch.zeros(1, dtype=torch.long), 1.0)
        assert set(ids[counts > 0].tolist()) == {3, 64, 127}
    extremes = torch.tensor([[0.0, np.nextafter(1.0, 0.0)]], dtype=torch.float64)
    ids, _, counts, *_ = draw(logits, extremes, torch.zeros(1, dtype=torch.long), 1.0)
    assert set(ids[counts > 0].tolist()) == {3, 127}


def test_uniforms_depend_on_seed_split_and_row_alone():
    """However rows are cut into batches; every one differs from the others'; draw j lies in the j-th n-th."""
    sampling = Sampling(6, seed=7)
    whole = sampling.uniforms("train", 0, 5, 8)
    parts = [sampling.uniforms("train", first, rows, 8) for first, rows in ((0, 2), (2, 1), (3, 2))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (np.floor(whole * 6) == np.arange(6)).all()
    others = [sampling.uniforms("valid", 0, 5, 8), Sampling(6, seed=8).uniforms("train", 0, 5, 8)]
    assert len({array.tobytes() for array in [*whole, *others[0], *others[1]]}) == 15


def test_the_uniforms_are_those_of_the_first_sampled_cache():
    """Pinned: a cache that is gone on with, or made again, draws the same ids."""
    found = Sampling(3, seed=1).uniforms("train", 2, 1, 2)
    np.testing.assert_allclose(found.ravel(), PINNED, rtol=0, atol=0)


def test_chunks_of_any_size_give_the_same_draws():
    """N tokens in one chunk or in many: equal to the last bit."""
    logits_NV, tokens_BT = _logits(1, 48, 200), np.arange(48, dtype=np.int32).reshape(4, 12)
    sampling = Sampling(9, 0.8)
    uniforms = sampling.uniforms("train", 0, 4, 12)
    whole, parts = (
        draw_chunks(((at, logits_NV[at : at + step]) for at in range(0, 48, step)), tokens_BT, uniforms, sampling)
        for step in (48, 5)
    )
    for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isnan(whole.lp_next_BT[:, -1]).all() and np.isfinite(whole.lp_next_BT[:, :-1]).all()


def test_engines_that_tell_only_their_top_k_are_refused_with_those_that_can():
    check_draws("transformers")
    with pytest.raises(PreflightError, match=r"engine 'vllm' cannot draw(.|\n)*llama_cpp, transformers"):
        check_draws("vllm")
