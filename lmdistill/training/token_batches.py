"""Steps of so many tokens instead of so many rows, for rows of unequal length (`packing: single`).

A step takes rows in their order until the next one would exceed the tokens it may have. Its rows are then dealt into
micro-batches of neighbours in length, and each micro-batch is cut to its longest row: the padding that is left is that
between neighbours. The loss is the mean over the counted tokens of the whole step, so how rows are dealt changes
nothing but rounding.

Axes: R rows of the split, T tokens in a row, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lmdistill.corpus.format import PAD
from lmdistill.errors import PreflightError
from lmdistill.signals.batch import SignalsBatch

Lengths = NDArray[np.int64]
READ_ROWS = 64  # rows whose lengths are found at once
MULTIPLE = 8  # of a cut row's length: matrix units like it


def row_lengths(reader: Any) -> Lengths:
    """Tokens of every row of the split `[R]`, without the padding at its end."""
    found = np.empty(reader.rows, np.int64)
    for start in range(0, reader.rows, READ_ROWS):
        rows = np.arange(start, min(start + READ_ROWS, reader.rows))
        found[rows] = lengths_of(reader.read(rows).flags_RT)
    return found


def lengths_of(flags_RT: NDArray[np.uint8]) -> Lengths:
    """Tokens of each row up to its last that is no padding."""
    present_RT = (flags_RT & PAD) == 0
    last_R = flags_RT.shape[1] - np.argmax(present_RT[:, ::-1], axis=1)
    return np.where(present_RT.any(axis=1), last_R, 0).astype(np.int64)


@dataclass(frozen=True)
class TokenBatches:
    """A training's micro-batches, all steps in a row: each a list of row numbers."""

    batches: list[list[int]]
    tokens_S: Lengths  # of every step

    @property
    def steps(self) -> int:
        """Steps S."""
        return len(self.tokens_S)


def token_batches(order: Sequence[int], lengths_R: Lengths, batch_tokens: int, groups: int, most: int) -> TokenBatches:
    """Deal the rows of `order` into at most `most` steps of at most `batch_tokens` tokens and `groups` micro-batches.

    Rows at the end that fill no step are left out. Raises PreflightError where a step of the longest rows has fewer
    rows than micro-batches.
    """
    longest = int(lengths_R.max())
    if batch_tokens // longest < groups:
        raise PreflightError(
            f"batch_tokens {batch_tokens} holds {batch_tokens // longest} of the longest rows ({longest} tokens)",
            why=f"a step is dealt into {groups} micro-batches, and each needs a row",
            fix="raise batch_tokens, or train with fewer processes",
        )
    steps: list[list[int]] = [[]]
    filled = 0
    for row in order:
        if filled + lengths_R[row] > batch_tokens:
            if len(steps) == most:
                break
            steps.append([])
            filled = 0
        steps[-1].append(int(row))
        filled += int(lengths_R[row])
    else:
        steps.pop()
    dealt = [group for step in steps for group in _deal(step, lengths_R, groups)]
    return TokenBatches(dealt, np.array([lengths_R[step].sum() for step in steps], np.int64))


def _deal(step: list[int], lengths_R: Lengths, groups: int) -> list[list[int]]:
    """Neighbours in length together, each group about as many tokens, none empty."""
    by_length = sorted(step, key=lambda row: (int(lengths_R[row]), row))
    cumulated = np.cumsum(lengths_R[by_length])
    cuts = [0]
    for group in range(1, groups):
        wanted = int(np.searchsorted(cumulated, cumulated[-1] * group / groups, side="right"))
        cuts.append(min(max(wanted, cuts[-1] + 1), len(by_length) - (groups - group)))
    return [by_length[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(by_length)], strict=True)]


class BatchDataset(Dataset[list[int]]):  # type: ignore[misc]
    """Micro-batches one by one, in their order."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[int]:
        return self.batches[index]


def cut(batch: SignalsBatch) -> SignalsBatch:
    """The batch without the columns that are padding in all its rows."""
    width = batch.flags_RT.shape[1]
    longest = max(1, int(lengths_of(batch.flags_RT).max()))
    stop = min(width, -(-longest // MULTIPLE) * MULTIPLE)
    arrays = {name: array[:, :stop] for name, array in vars(batch).items() if array is not None and name != "rows"}
    return replace(batch, **arrays)


class OneBatch:
    """A collator for a BatchDataset: the loader's batch of one micro-batch is that micro-batch."""

    def __init__(self, collator: Callable[[Sequence[int]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, batches: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Its rows as tensors."""
        (rows,) = batches
        return self.collator(rows)
