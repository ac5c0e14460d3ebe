"""Documents into a cache's rows: whole, one after another, none cut by a row's end unless it is longer than a row.

Axes: R rows, T tokens in a row, L tokens of a document.
Each was scored alone, so that rows are those of packing `isolate`: a trainer starts anew at every document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS, PAD, TRAIN, VALID
from lmdistill.signals.exchange.document import Document, Reading
from lmdistill.teachers.engine import TopK

PACKING = "isolate"
Row = list[Document]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shape:
    """What of a document decides where it goes."""

    split: str
    length: int
    first_counted: int | None  # position of the first prediction that counts; None: there is none

    @classmethod
    def of(cls, document: Document, valid_fraction: float) -> Shape:
        """A hash of its tokens decides the split, so that equal documents stay together."""
        digest = hashlib.sha256(document.ids_L.astype("<u4").tobytes()).digest()
        split = VALID if int.from_bytes(digest[:8]) < valid_fraction * 2**64 else TRAIN
        counted = np.flatnonzero(document.counted_L)
        return cls(split, len(document.ids_L), int(counted[0]) if len(counted) else None)


def in_rows(items: Iterable[tuple[Shape, Item]], row_tokens: int) -> Iterator[tuple[str, list[Item]]]:
    """Each row as it is full, with its split; documents without a target in the row are left out."""
    rows: dict[str, list[Item]] = {}
    used: dict[str, int] = {}
    for shape, item in items:
        if shape.first_counted is None or shape.first_counted >= row_tokens - 1:
            continue
        split, length = shape.split, min(shape.length, row_tokens)
        if split in rows and used[split] + length > row_tokens:
            yield split, rows.pop(split)
        if split not in rows:
            rows[split], used[split] = [], 0
        rows[split].append(item)
        used[split] += length
    yield from rows.items()


def tokens_of_rows(rows: Sequence[Row], row_tokens: int, pad_id: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Tokens and flags `[R, T]`."""
    tokens_RT = np.full((len(rows), row_tokens), pad_id, np.int32)
    flags_RT = np.full((len(rows), row_tokens), PAD, np.uint8)
    for index, row in enumerate(rows):
        for document, place in _places(row, row_tokens):
            length = place.stop - place.start
            tokens_RT[index, place] = document.ids_L[:length]
            flags_RT[index, place] = np.where(document.counted_L[:length], LOSS, 0)
            flags_RT[index, place.stop - 1] = 0  # the target of its last prediction is not in the row
            flags_RT[index, place.start] |= DOC_START
    return tokens_RT, flags_RT


def predictions_of_row(row: Row, row_tokens: int, reading: Reading) -> tuple[TopK, NDArray[np.bool_]]:
    """The entries of a row `[1, T, K]`, and which positions the source scored `[1, T]`."""
    whole, scored_1T = reading.uniform(row_tokens), np.zeros((1, row_tokens), bool)
    for document, place in _places(row, row_tokens):
        length, exact = place.stop - place.start, reading.top_k(document)
        for name in ("ids_BTK", "logp_BTK", "tail_BT", "lp_next_BT"):
            getattr(whole, name)[:, place] = getattr(exact, name)[:, :length]
        whole.lp_next_BT[:, place.stop - 1] = np.nan  # what follows in the row is not what followed there
        scored_1T[0, place] = document.scored_L[:length]
    return whole, scored_1T


def _places(row: Row, row_tokens: int) -> Iterator[tuple[Document, slice]]:
    start = 0
    for document in row:
        stop = start + min(len(document.ids_L), row_tokens)
        yield document, slice(start, stop)
        start = stop
