"""The held-out predictions that every subject is scored on: rows of a corpus split, cut into sequences.

Axes: R rows, T tokens of a sequence, N predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS, PAD, CorpusReader, CorpusSplit
from lmdistill.errors import StageError


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens a runtime sees at once, starting from an empty context."""

    row: int
    tokens_T: NDArray[np.int64]
    positions_N: NDArray[np.int64]  # places in tokens_T whose prediction counts

    @property
    def targets_N(self) -> NDArray[np.int64]:
        """The tokens that follow `positions_N`."""
        return self.tokens_T[self.positions_N + 1]


@dataclass(frozen=True)
class HeldOut:
    """The chosen rows of a split, as sequences."""

    split: str
    rows: int
    sequence_length: int
    vocab_size: int
    sequences: tuple[ScoredSequence, ...]
    bytes_R: NDArray[np.int64]  # UTF-8 bytes of each row's targets

    @property
    def predictions(self) -> int:
        """How many predictions count."""
        return sum(len(sequence.positions_N) for sequence in self.sequences)


def chosen_rows(rows: int, sequence_length: int, tokens: int) -> NDArray[np.int64]:
    """Evenly spaced rows, so that every source of a corpus is heard, holding at most `tokens` (at least one row)."""
    count = max(1, min(rows, tokens // sequence_length))
    return np.unique(np.linspace(0, rows - 1, count).round().astype(np.int64))


def _sequences(split: CorpusSplit, row: int, slot: int, isolate: bool) -> Iterator[ScoredSequence]:
    flags_T: NDArray[Any] = np.asarray(split.flags_RT[row])
    tokens_T = np.asarray(split.tokens_RT[row], dtype=np.int64)
    length = int(np.flatnonzero(flags_T & PAD == 0)[-1]) + 1 if (flags_T & PAD == 0).any() else 0
    starts = [0]
    if isolate:
        starts += [int(at) for at in np.flatnonzero(flags_T[:length] & DOC_START) if at > 0]
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        positions_N = np.flatnonzero(flags_T[start:end] & LOSS)
        if len(positions_N):
            yield ScoredSequence(slot, tokens_T[start:end], positions_N)


def read_heldout(corpus: Path, split_name: str, tokens: int) -> HeldOut:
    """Rows of `split_name` with at most `tokens` tokens; raises StageError where no prediction counts.

    With packing `isolate` each document is a sequence of its own: an empty context is what isolation means, and
    it holds for every runtime. Otherwise a row is one sequence, as in training.
    """
    reader = CorpusReader(corpus)
    split = reader.split(split_name)
    rows = chosen_rows(len(split), reader.meta.sequence_length, tokens) if len(split) else np.zeros(0, np.int64)
    isolate = reader.meta.packing == "isolate"
    sequences = tuple(
        sequence for slot, row in enumerate(rows) for sequence in _sequences(split, int(row), slot, isolate)
    )
    if not sequences:
        raise StageError(
            f"split '{split_name}' has no prediction to score",
            why="no position of the chosen rows carries the LOSS flag",
            fix="give the corpus more documents, or raise evaluate's `tokens`",
        )
    bytes_R = np.asarray(split.bytes_R, dtype=np.int64)[rows]
    meta = reader.meta
    return HeldOut(split_name, len(rows), meta.sequence_length, meta.vocab_size, sequences, bytes_R)
