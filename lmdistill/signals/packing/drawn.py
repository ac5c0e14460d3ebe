"""A segment of drawn rows: each block is that of its ids and log-probs (segment.py), then how often each id came.

Axes: R rows, T tokens in a row, K entries of a token.
Counts of entries of like rank share a stream, as ids do; where t ≠ 1 a stream of log z comes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals import coded
from lmdistill.signals.format import Layout
from lmdistill.signals.packing.segment import SegmentDecoder, encode_segment, groups
from lmdistill.signals.packing.streams import Numbers, StreamDecoder, encode_stream, pack_all, unpack_all

U16 = np.dtype("<u2")


def drawn_dtype(layout: Layout) -> np.dtype[Any]:
    """One coded row [T]: the planes of a varying number of entries, their counts, and log z where t ≠ 1."""
    planes = [*coded.row_dtype(layout).descr, ("counts", "u1", (layout.row_tokens, layout.k))]
    if layout.sampling is not None and layout.sampling.weighted:
        planes.append(("log_z", "<f2", (layout.row_tokens,)))
    return np.dtype(planes)


def encode_drawn(layout: Layout, raw_R: NDArray[Any], block_rows: int) -> list[bytes]:
    """The tables of a segment, then its blocks of `block_rows` rows."""
    tables, *blocks = encode_segment(layout, raw_R, block_rows)
    parts = [_numbers(layout, raw_R[start : start + block_rows]) for start in range(0, len(raw_R), block_rows)]
    streams = [encode_stream(column) for column in zip(*parts, strict=True)]
    metas = pack_all(meta for meta, _ in streams)
    pages = zip(*(pages for _, pages in streams), strict=True)
    return [
        pack_all([tables, metas]),
        *(pack_all([block, b"".join(beside)]) for block, beside in zip(blocks, pages, strict=True)),
    ]


def _numbers(layout: Layout, raw_R: NDArray[Any]) -> Iterator[Numbers]:
    """What each stream holds of some rows, in order."""
    kept_RTK = coded.kept_mask(layout, raw_R)
    assert kept_RTK is not None
    for group in groups(layout.k, layout.row_tokens):
        yield raw_R["counts"][..., group][kept_RTK[..., group]].astype(U16)
    if "log_z" in (raw_R.dtype.names or ()):
        yield np.ascontiguousarray(raw_R["log_z"]).view(U16).ravel()


class DrawnDecoder(SegmentDecoder):
    """Decodes the blocks of one segment of drawn rows."""

    def __init__(self, layout: Layout, tables: bytes) -> None:
        inner, metas = unpack_all(tables)
        super().__init__(layout, inner)
        self._beside = [StreamDecoder(meta, U16) for meta in unpack_all(metas)]
        self._groups = groups(layout.k, layout.row_tokens)
        self.nbytes += len(metas)

    def decode(self, blocks: Sequence[bytes], rows: Sequence[int]) -> NDArray[Any]:
        """The coded rows of blocks; raises IntegrityError where what is derived is not what was captured."""
        inner, beside = zip(*(unpack_all(block) for block in blocks), strict=True)
        base_R = super().decode(inner, rows)
        raw_R = np.zeros(len(base_R), drawn_dtype(self.layout))
        for name in base_R.dtype.names or ():
            raw_R[name] = base_R[name]
        for pages, (start, stop) in zip(beside, pairwise(accumulate(rows, initial=0)), strict=True):
            self._fill(raw_R[start:stop], pages)
        return raw_R

    def _fill(self, raw_R: NDArray[Any], pages: bytes) -> None:
        """A block's counts and log z."""
        kept_RTK = coded.kept_mask(self.layout, raw_R)
        assert kept_RTK is not None
        streams = iter(self._beside)
        for group in self._groups:
            there = kept_RTK[..., group]
            numbers = np.empty(int(there.sum()), U16)
            pages = next(streams).read(pages, numbers)
            raw_R["counts"][..., group][there] = numbers
        for stream in streams:
            numbers = np.empty(raw_R["log_z"].size, U16)
            pages = stream.read(pages, numbers)
            raw_R["log_z"] = numbers.view(np.float16).reshape(raw_R["log_z"].shape)
