"""Steps of so many tokens: every row once and in order, no step too full, little padding, the same loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distill_stage import STAGE, _context
from training_toys import LENGTH

from lmdistill.corpus.format import LOSS, PAD, tokens_digest
from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import Artefact, ModelRef
from lmdistill.signals.batch import SignalsBatch
from lmdistill.training.token_batches import cut, lengths_of, token_batches

LENGTHS = st.lists(st.integers(1, 64), min_size=40, max_size=120).map(np.array)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(256, 600), st.integers(0, 99))
def test_rows_keep_their_order_over_steps_and_no_step_is_too_full(
    lengths: np.ndarray, groups: int, batch_tokens: int, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    found = token_batches(order, lengths, batch_tokens, groups, 10**6)
    assert len(found.batches) == found.steps * groups and all(found.batches)
    steps = [found.batches[start : start + groups] for start in range(0, len(found.batches), groups)]
    rows = [sorted(row for group in step for row in group) for step in steps]
    place = 0
    for step, tokens in zip(rows, found.tokens_S, strict=True):
        assert step == sorted(order[place : place + len(step)])
        place += len(step)
        assert tokens == lengths[step].sum() <= batch_tokens
        assert tokens + lengths[order[place]] > batch_tokens
    assert int(found.tokens_S.sum()) == lengths[order[:place]].sum()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(2, 4))
def test_neighbours_in_length_go_together(lengths: np.ndarray, groups: int) -> None:
    found = token_batches(range(len(lengths)), lengths, 400, groups, 10**6)
    for start in range(0, len(found.batches), groups):
        spans = [(lengths[group].min(), lengths[group].max()) for group in found.batches[start : start + groups]]
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_dealing_by_length_leaves_less_padding_than_equal_rows_do() -> None:
    lengths = np.random.default_rng(0).integers(8, 512, 400)
    found = token_batches(range(400), lengths, 8192, 4, 10**6)
    padded = sum(len(group) * lengths[group].max() for group in found.batches)
    assert padded < 1.3 * int(found.tokens_S.sum())
    assert 512 * sum(map(len, found.batches)) > 1.8 * int(found.tokens_S.sum())


def test_a_step_too_small_for_its_micro_batches_is_refused() -> None:
    with pytest.raises(PreflightError, match="holds 1 of the longest rows"):
        token_batches(range(8), np.full(8, 64), 100, 2, 9)


def test_no_more_steps_are_made_than_asked_for_and_a_rest_makes_none() -> None:
    assert token_batches(range(100), np.full(100, 10), 50, 1, 3).batches == [
        [*range(5)],
        [*range(5, 10)],
        [*range(10, 15)],
    ]
    assert token_batches(range(12), np.full(12, 10), 50, 1, 9).steps == 2


def test_only_columns_of_padding_are_cut() -> None:
    flags = np.full((3, 40), PAD, np.uint8)
    for row, length in enumerate((5, 19, 11)):
        flags[row, :length] = LOSS
    batch = SignalsBatch.empty(np.arange(3), 40, 4)
    batch.flags_RT[:] = flags
    assert lengths_of(flags).tolist() == [5, 19, 11]
    short = cut(batch)
    assert short.flags_RT.shape == (3, 24) and short.ids_RTK.shape == (3, 24, 4)
    assert short.weight_RTK is None and short.rows.tolist() == [0, 1, 2]
    full = SignalsBatch.empty(np.arange(1), 12, 2)
    full.flags_RT[:] = LOSS
    assert cut(full).tokens_RT.shape == (1, 12)


def _pad(signals: Artefact, folder: Path) -> Artefact:
    """The corpus with one document a row: rows of 4 to 32 tokens, the rest padding."""
    out = folder / "out"
    shutil.copytree(signals.out, out)
    flags = np.load(out / "train.flags.npy")
    for row, length in enumerate(np.random.default_rng(0).integers(4, LENGTH + 1, len(flags))):
        flags[row, length - 1] = 0
        flags[row, length:] = PAD
    np.save(out / "train.flags.npy", flags)
    about = json.loads((out / "corpus.json").read_text())
    digest = tokens_digest(np.load(out / "train.tokens.npy"), flags)
    about["packing"], about["splits"]["train"]["digest"] = "single", digest
    (out / "corpus.json").write_text(json.dumps(about))
    return Artefact("corpus", "corpus", "corpus", "7" * 64, folder)


def test_a_step_of_tokens_trains_and_how_it_is_dealt_changes_nothing_but_rounding(
    corpus: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    rows = _pad(corpus, tmp_path / "padded")
    records = []
    for name, keys in {"whole": {}, "dealt": {"micro_rows": 2}}.items():
        ctx = _context(
            tmp_path / name, rows, student, loss="full_kl", tokens=1500, batch_tokens=160, log_steps=1, **keys
        )
        STAGE.run(replace(ctx, teacher=teacher))
        records.append(json.loads((tmp_path / name / "out/training.json").read_text()))
    whole, dealt = records
    assert whole["steps"] == 9 and 9 * (160 - LENGTH) < whole["tokens"] <= 9 * 160
    assert [line["tokens"] for line in whole["log"]] == [line["tokens"] for line in dealt["log"]]
    for line, other in zip(whole["log"], dealt["log"], strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    assert whole["log"][-1]["kd"] < 0.95 * whole["log"][0]["kd"]
