"""The teach stage: what it refuses before work starts, what it makes, what it promises afterwards."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from pydantic import ValidationError
from teach_contexts import before, running
from teachers_toys import VOCAB, save_corpus, save_tokenizer

from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, Runtime, StageContext
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.teach import TeachConfig, TeachStage

ROWS, LENGTH = 10, 24
STAGE = TeachStage()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus artefact of the toy tokenizer's tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    save_tokenizer(folder / "out/tokenizer")
    return save_corpus(folder, np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)))


def test_a_good_plan_passes_and_is_estimated(toy, corpus, tmp_path):
    """No errors; disk is rows × stride, time and memory follow from the parameters."""
    ctx = before(toy, corpus, tmp_path, k=8)
    assert STAGE.preflight(ctx) == []
    estimate = STAGE.estimate(ctx)
    assert estimate.disk_bytes == ROWS * LENGTH * (2 + 1 + 2 + 2 + 2 + 8 * 2 + 7)
    assert estimate.seconds > 0
    assert estimate.memory_bytes > 0


@pytest.mark.parametrize(("config", "message"), [
    ({"k": VOCAB + 1}, f"k is {VOCAB + 1}, the teacher's vocabulary has {VOCAB}"),
    ({"engine": "transformer"}, "did you mean 'transformers'"),
    ({"splits": ("train", "test")}, "the corpus has train"),
])  # fmt: skip
def test_what_cannot_work_is_refused_first(toy, corpus, tmp_path, config, message):
    """K above the vocabulary, a mistyped engine, a split that is not there: one message each, before any work."""
    [error] = STAGE.preflight(before(toy, corpus, tmp_path, **{"k": 8, **config}))
    assert isinstance(error, PreflightError)
    assert message in error.render()


def test_other_token_maps_are_listed(toy, corpus, tmp_path):
    """A corpus in another tokenizer's ids is refused before and at the start of a run, with the ids."""
    shutil.copytree(corpus.path, tmp_path / "corpus")
    save_tokenizer(tmp_path / "corpus/out/tokenizer", prefix="x")
    other = Artefact("corpus", "corpus", "corpus", "f" * 64, tmp_path / "corpus")
    [error] = STAGE.preflight(before(toy, other, tmp_path, k=8))
    assert "3: 'x3' / 'w3'" in error.why
    with pytest.raises(PreflightError, match="different token maps: 1 ids differ"):
        STAGE.run(running(toy, other, tmp_path / "out"))


def test_keys_are_tight():
    """No K of zero, no other precision, no unknown key."""
    for wrong in (
        {"k": 0},
        {"precision": "int8"},
        {"splits": ()},
        {"top_k": 3},
        {"top_p": 1.0},
        {"k_min": 2},
        {"top_p": 0.9, "k_min": 33},
    ):
        with pytest.raises(ValidationError):
            TeachConfig(**wrong)


def test_an_unknown_variant_is_told_before_anything_runs(toy, corpus, tmp_path):
    """With the nearest name and what there is."""
    [error] = STAGE.preflight(before(toy, corpus, tmp_path, variant="mmapp"))
    assert "did you mean 'mmap'" in error.what


@pytest.mark.parametrize("variant", ["mmap", "compact"])
def test_a_varying_number_of_entries_is_captured_in_either_variant(toy, corpus, tmp_path, variant):
    """The recipe's keys reach the cache: some tokens have k entries, some fewer, none under k_min."""
    ctx = running(toy, corpus, tmp_path / "out", variant=variant, top_p=0.5, k_min=2)
    STAGE.verify(ctx, STAGE.run(ctx))
    counts = np.isfinite(SignalsReader(ctx.out).read(slice(None)).logp_RTK).sum(-1)
    assert counts.min() == 2
    assert counts.max() <= 8
    assert len(set(counts.ravel().tolist())) > 1


def test_caches_made_before_these_keys_were_there_are_still_found():
    """Their defaults are no part of the key; the compact variant adds the coder whose version makes its bytes."""
    assert not {"top_p", "k_min"} & set(semantic(TeachConfig(), str))
    assert semantic(TeachConfig(top_p=0.9), str)["top_p"] == 0.9
    assert STAGE.tools_used(TeachConfig(variant="compact")) == (*STAGE.tools_used(TeachConfig()), "pcodec")


def test_run_and_run_again(toy, corpus, tmp_path):
    """Same metrics and bytes again, and its own verification passes."""
    first, second = (running(toy, corpus, tmp_path / name) for name in ("one", "two"))
    metrics = STAGE.run(first)
    assert STAGE.run(second) == metrics
    STAGE.verify(first, metrics)
    files = sorted(path.name for path in first.out.iterdir())
    assert files == sorted([f"train-0000{i}.{end}" for i in range(3) for end in ("sig", "json")] + ["signals.json"])
    assert all((first.out / name).read_bytes() == (second.out / name).read_bytes() for name in files)
    assert metrics["bytes_per_token"] == 32
    assert 0 < metrics["head_mass"] < 1
    assert metrics["tokens"] == sum(split["tokens"] for split in metrics["splits"].values()) > 0
    assert metrics["digest"] == SignalsReader(first.out).digest
    assert STAGE.run(first) == metrics


def test_verify_fails_on_damage(toy, corpus, tmp_path):
    """The postcondition reads every byte."""
    ctx = running(toy, corpus, tmp_path / "out")
    metrics = STAGE.run(ctx)
    shard = ctx.out / "train-00001.sig"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(IntegrityError, match=r"train-00001\.sig: block 0"):
        STAGE.verify(ctx, metrics)


def test_a_corpus_that_changed_is_refused(toy, corpus, tmp_path):
    """Tokens that are not those the corpus stage wrote are never scored."""
    shutil.copytree(corpus.path, tmp_path / "corpus")
    path = tmp_path / "corpus/out/train.tokens.npy"
    tokens = np.load(path)
    tokens[0, 0] ^= 1
    np.save(path, tokens)
    changed = Artefact("corpus", "corpus", "corpus", "f" * 64, tmp_path / "corpus")
    with pytest.raises(IntegrityError, match="not what was written"):
        STAGE.run(running(toy, changed, tmp_path / "out"))


def test_a_sampled_cache_is_drawn_and_proven(toy, corpus, tmp_path):
    """Same bytes again; its entries are drawn, at most `draws` a token; no K."""
    settings = TeachConfig(variant="sampled", draws=10, draw_seed=3, shard_rows=4, batch_rows=2)
    first, second = (
        StageContext(
            "teach", settings, {"corpus": [corpus]}, toy, tmp_path / name, tmp_path, runtime=Runtime(device="cpu")
        )
        for name in ("one", "two")
    )
    metrics = STAGE.run(first)
    assert STAGE.run(second) == metrics
    STAGE.verify(first, metrics)
    assert metrics["k"] == 10
    batch = SignalsReader(first.out).read(slice(None))
    np.testing.assert_allclose(batch.weight_RTK.sum(-1), 1, atol=1e-6)
    assert (batch.ids_RTK < VOCAB).all()


@pytest.mark.parametrize(("keys", "message"), [
    ({"draws": 8}, "draws: goes with `variant: sampled`, not mmap"),
    ({"variant": "compact", "draw_seed": 0}, "draw_seed: goes with `variant: sampled`, not compact"),
    ({"variant": "sampled", "k": 8, "top_p": 0.9}, "k, top_p: does not go with `variant: sampled`"),
    ({"variant": "sampled", "draws": 256}, "less than or equal to 255"),
])  # fmt: skip
def test_keys_of_one_kind_of_cache_are_refused_for_the_other_by_name(keys, message):
    with pytest.raises(ValidationError, match=message):
        TeachConfig(**keys)


def test_an_engine_that_cannot_draw_is_refused_first(toy, corpus, tmp_path):
    errors = STAGE.preflight(before(toy, corpus, tmp_path, variant="sampled", engine="vllm"))
    assert any("engine 'vllm' cannot draw ids" in error.what for error in errors)
    assert STAGE.preflight(before(toy, corpus, tmp_path, variant="sampled")) == []
