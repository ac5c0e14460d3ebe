"""Which ids a token's candidates are: classes of positions, each with the list of its usual candidates.

Axes: N tokens of a segment, K entries of a token, V vocabulary, C classes, E entries of all classes' lists.
Where a verb is due and where a year is due the candidates are others: every position names its class, and its K ids are
places in that class' list, the most usual first; ids that are not in it are given by their rank in the whole segment.
Lists and ranks are part of the segment, so that it decodes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.packing.classes import cluster
from lmdistill.signals.packing.streams import Numbers, pack_all, pack_numbers, unpack_all, unpack_numbers, width_of

Ints = NDArray[np.int64]
LIST = 4096  # most entries of a class' list
LEAST_COUNT = 3  # of an id in a class, else its place in the list costs more than it saves
TOKENS_A_CLASS, CLASSES = 1024, 96


def levels_of(counts: Ints) -> NDArray[np.uint16]:
    """Counts by half powers of two, 0 for none: all that an order by frequency needs."""
    with np.errstate(divide="ignore"):
        levels = np.floor(2 * np.log2(counts.astype(np.float64))) + 1
    return np.where(counts > 0, levels, 0).astype(np.uint16)


def order_by(levels_V: Numbers) -> Ints:
    """Ids by level, the highest first; within a level by id."""
    order: Ints = np.argsort(levels_V.max(initial=0) - levels_V.astype(np.int64), kind="stable")
    return order


@dataclass(frozen=True)
class IdModel:
    """The tables of a segment."""

    levels_V: Numbers
    runs_CL: Numbers  # lengths of a list's runs of equal level, the highest level first
    ranks_E: Ints  # the lists, class by class, as ranks

    @property
    def symbol_dtype(self) -> np.dtype[Any]:
        """What holds a place in a list or LIST + a rank."""
        return width_of(LIST + len(self.levels_V))

    def to_bytes(self) -> bytes:
        """Levels, runs, and the ranks in each run as differences, as they ascend."""
        runs = self.runs_CL[self.runs_CL > 0].astype(np.int64)
        steps = np.diff(self.ranks_E, prepend=0) - 1
        starts = np.cumsum(runs) - runs
        steps[starts] = self.ranks_E[starts]
        shape = np.array(self.runs_CL.shape, np.uint32)
        columns = (self.levels_V, shape, self.runs_CL.ravel(), steps.astype(width_of(len(self.levels_V))))
        return pack_all(pack_numbers(column) for column in columns)

    @classmethod
    def from_bytes(cls, data: bytes) -> IdModel:
        """Back from `to_bytes`."""
        levels_V, shape, runs, steps = (unpack_numbers(part) for part in unpack_all(data))
        sums = np.cumsum(steps.astype(np.int64) + 1)
        lengths = runs[runs > 0].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        before = np.where(starts > 0, sums[starts - 1], 0) if len(sums) else starts
        return cls(levels_V, runs.reshape(shape.astype(int)), sums - np.repeat(before, lengths) - 1)

    def encode(self, ids_NK: Ints, class_N: Ints) -> Numbers:
        """A symbol for each id: its place in its class' list, else LIST + its rank."""
        rank_V = inverse(order_by(self.levels_V))
        ends = np.cumsum(self.runs_CL.sum(axis=1, dtype=np.int64))
        symbols_NK = np.empty(ids_NK.shape, self.symbol_dtype)
        for index, end in enumerate(ends.tolist()):
            here_N = class_N == index
            listed = self.ranks_E[end - int(self.runs_CL[index].sum()) : end]
            symbol_V = np.arange(LIST, LIST + len(rank_V)).astype(self.symbol_dtype)
            symbol_V[listed] = np.arange(len(listed))
            symbols_NK[here_N] = symbol_V[rank_V[ids_NK[here_N]]]
        return symbols_NK

    def decoder(self) -> IdDecoder:
        """The tables as decoding wants them."""
        order_V = order_by(self.levels_V)
        lengths = self.runs_CL.sum(axis=1, dtype=np.int64)
        ids = np.concatenate([order_V[self.ranks_E], order_V]).astype(width_of(len(order_V) - 1))
        return IdDecoder(ids, (np.cumsum(lengths) - lengths).astype(np.int32), len(self.ranks_E))


@dataclass(frozen=True)
class IdDecoder:
    """Look-up tables of a segment."""

    ids: NDArray[Any]  # the lists one after another, then all ids by rank
    starts_C: NDArray[np.int32]  # where a class' list begins
    entries: int  # of all lists

    def decode(self, symbols_KN: Numbers, start_N: NDArray[np.int32]) -> NDArray[Any]:
        """The ids of symbols; `start_N` is `starts_C` of each token's class."""
        place_KN = np.where(symbols_KN < LIST, start_N, np.int32(self.entries - LIST))
        place_KN += symbols_KN
        return self.ids.take(place_KN, mode="clip")

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self.ids.nbytes + self.starts_C.nbytes


def build(ids_NK: Ints, context_N: Ints, kept_NK: NDArray[np.bool_] | None, vocab: int) -> tuple[IdModel, Ints]:
    """The model of a segment's ids and the class of each position; `context_N` is the token at the position."""
    flat = ids_NK.ravel() if kept_NK is None else ids_NK[kept_NK]
    levels_V = levels_of(np.bincount(flat, minlength=vocab))
    rank_V = inverse(order_by(levels_V))
    ranks_NK = rank_V[ids_NK]
    class_N = cluster(ranks_NK, rank_V[context_N], kept_NK, max(1, min(CLASSES, len(ids_NK) // TOKENS_A_CLASS)))
    lists = []
    for index in range(int(class_N.max()) + 1):
        here_N = class_N == index
        listed = ranks_NK[here_N] if kept_NK is None else ranks_NK[here_N][kept_NK[here_N]]
        lists.append(_usual(np.bincount(listed.ravel(), minlength=vocab)))
    runs_CL = np.zeros((len(lists), max(len(runs) for runs, _ in lists)), np.uint32)
    for row, (runs, _) in zip(runs_CL, lists, strict=True):
        row[: len(runs)] = runs
    return IdModel(levels_V, runs_CL, np.concatenate([ranks for _, ranks in lists])), class_N


def _usual(counts_V: Ints) -> tuple[Ints, Ints]:
    """A class' list: ranks by level, the highest level first, ascending within; and how many each level has."""
    ranks = np.flatnonzero(counts_V >= LEAST_COUNT)
    levels = levels_of(counts_V[ranks]).astype(np.int64)
    first = np.argsort(-levels, kind="stable")[:LIST]
    ranks, levels = ranks[first], levels[first]
    return np.bincount(levels.max(initial=0) - levels), ranks


def inverse(order: Ints) -> Ints:
    """The permutation that undoes `order`."""
    undone = np.empty_like(order)
    undone[order] = np.arange(len(order))
    return undone
