"""A segment of coded rows as bytes: its tables, then blocks of rows that decode by themselves with those tables.

Axes: R rows, T tokens in a row, K entries of a token, N tokens of a block (R·T).
Streams of a block, in this order: class, candidates' symbols, gap symbols, top-1, tail, slots, tokens, lp_next, flags;
where the number of entries varies, it comes first. Entries of like rank share a histogram.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError
from lmdistill.signals import coded
from lmdistill.signals.format import Layout
from lmdistill.signals.packing import derived, gap_model, id_model
from lmdistill.signals.packing.streams import Numbers, StreamDecoder, encode_stream, pack_all, unpack_all, width_of

U16 = np.dtype("<u2")
PAGE_NUMBERS = 2**20  # most numbers of one page
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Planes:
    """Coded rows with ids and tokens in one piece each, and which entries count; None where all do."""

    raw_R: NDArray[Any]
    tokens_RT: NDArray[np.int64]
    ids_RTK: NDArray[np.int64]
    kept_RTK: NDArray[np.bool_] | None

    @classmethod
    def of(cls, layout: Layout, raw_R: NDArray[Any]) -> Planes:
        """The planes of coded rows."""
        tokens_RT, ids_RTK = (coded.joined(layout, raw_R, name) for name in ("token", "ids"))
        return cls(raw_R, tokens_RT, ids_RTK, coded.kept_mask(layout, raw_R))


def groups(stop: int, row_tokens: int) -> list[slice]:
    """Entries that share a stream: ever wider, as ranks matter less and less."""
    found, first = [], 0
    while first < stop:
        width = max(1, min(first // 2 if first > 2 else 1, PAGE_NUMBERS // row_tokens))
        found.append(slice(first, min(first + width, stop)))
        first += width
    return found


def stream_types(layout: Layout, symbol: np.dtype[Any]) -> list[np.dtype[Any]]:
    """The number type of each stream, in order."""
    id_groups, gap_groups = _all_groups(layout)
    token = width_of(layout.vocab_size)
    kept = [U16] if layout.variable else []
    return [*kept, U16, *[symbol] * len(id_groups), *[U16] * len(gap_groups), U16, U16, U16, token, U16, U16, U16]


@lru_cache
def _all_groups(layout: Layout) -> tuple[list[slice], list[slice]]:
    return groups(layout.k, layout.row_tokens), groups(layout.k - 1, layout.row_tokens)


def witness(raw_R: NDArray[Any]) -> int:
    """crc32 of the tokens and of `lp_next`: what is derived on reading is proven to be what was captured."""
    planes = [name for name in ("token", "token_high", "lp_next") if name in (raw_R.dtype.names or ())]
    crc = 0
    for name in planes:
        crc = zlib.crc32(np.ascontiguousarray(raw_R[name]).data, crc)
    return crc


def encode_segment(layout: Layout, raw_R: NDArray[Any], block_rows: int) -> list[bytes]:
    """The tables of a segment, then its blocks of `block_rows` rows."""
    planes, shape = Planes.of(layout, raw_R), raw_R["token"].shape
    tokens = shape[0] * shape[1]
    kept_NK = None if planes.kept_RTK is None else planes.kept_RTK.reshape(-1, layout.k)
    ids_NK, gaps_NK = planes.ids_RTK.reshape(-1, layout.k), raw_R["gaps"].reshape(tokens, layout.k - 1)
    ids, class_N = id_model.build(ids_NK, planes.tokens_RT.ravel(), kept_NK, layout.vocab_size)
    gaps = gap_model.GapModel.build(gaps_NK, None if kept_NK is None else kept_NK[:, 1:])
    symbols = ids.encode(ids_NK, class_N).reshape(*shape, layout.k), gaps.encode(gaps_NK).reshape(*shape, layout.k - 1)
    columns = list(_columns(layout, planes, class_N.reshape(shape), *symbols))
    starts = range(0, len(raw_R), block_rows)
    metas, pages = [], []
    for (values, keep), dtype in zip(columns, stream_types(layout, ids.symbol_dtype), strict=True):
        parts = [_part(values, keep, slice(start, start + block_rows), dtype) for start in starts]
        meta, column = encode_stream(parts)
        metas.append(meta)
        pages.append(column)
    blocks = [
        _CRC.pack(witness(raw_R[start : start + block_rows])) + b"".join(column[index] for column in pages)
        for index, start in enumerate(starts)
    ]
    return [pack_all([ids.to_bytes(), gaps.to_bytes(), pack_all(metas)]), *blocks]


def _part(values: NDArray[Any], keep: NDArray[np.bool_] | None, rows: slice, dtype: np.dtype[Any]) -> Numbers:
    """A block's numbers in one stream, entry by entry: all tokens' first, then all tokens' second."""
    part, mask = (None if array is None else array[rows].reshape(-1, *array.shape[2:]).T for array in (values, keep))
    assert part is not None
    return (part if mask is None else part[mask]).astype(dtype).ravel()


def _columns(
    layout: Layout, planes: Planes, class_RT: NDArray[Any], ids_RTK: NDArray[Any], gaps_RTK: NDArray[Any]
) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
    """Each stream's values over all rows, and which of them are stored; None for all."""
    raw_R, kept_RTK = planes.raw_R, planes.kept_RTK
    if layout.variable:
        yield raw_R["kept"], None
    yield class_RT, None
    id_groups, gap_groups = _all_groups(layout)
    for group in id_groups:
        yield ids_RTK[..., group], None if kept_RTK is None else kept_RTK[..., group]
    for group in gap_groups:
        yield gaps_RTK[..., group], None if kept_RTK is None else kept_RTK[..., 1:][..., group]
    slots_RT = derived.slots(planes.tokens_RT, planes.ids_RTK, kept_RTK)
    top1, tail, lp_next = (np.ascontiguousarray(raw_R[name]).view(U16) for name in ("top1", "tail", "lp_next"))
    count_RT = None if kept_RTK is None else kept_RTK.sum(axis=-1)
    predicted = derived.predict(layout.companding, top1, np.ascontiguousarray(raw_R["gaps"]), count_RT, slots_RT)
    yield top1, None
    yield derived.residual(tail, predicted.tail), None
    yield slots_RT, None
    yield planes.tokens_RT, derived.spelled(slots_RT, layout.k)
    lp_residual = derived.residual(lp_next, predicted.lp_next)
    yield lp_residual, predicted.among
    yield lp_residual, ~predicted.among
    yield raw_R["flags"], None


class SegmentDecoder:
    """Decodes the blocks of one segment."""

    def __init__(self, layout: Layout, tables: bytes) -> None:
        self.layout = layout
        ids, gaps, metas = unpack_all(tables)
        model = id_model.IdModel.from_bytes(ids)
        self._ids, self._gaps = model.decoder(), gap_model.GapModel.from_bytes(gaps).table()
        types = stream_types(layout, model.symbol_dtype)
        self._streams = [StreamDecoder(meta, dtype) for meta, dtype in zip(unpack_all(metas), types, strict=True)]
        self.nbytes = self._ids.nbytes + self._gaps.nbytes + len(tables)

    def decode(self, block: bytes, rows: int) -> NDArray[Any]:
        """The coded rows of a block; raises IntegrityError where what is derived is not what was captured."""
        layout, shape = self.layout, (rows, self.layout.row_tokens)
        raw_R = np.empty(rows, coded.row_dtype(layout))
        pages = _Pages(iter(self._streams), block[_CRC.size :], shape[0] * shape[1])
        count_N = pages.all().astype(np.int64) + 1 if layout.variable else None
        kept_KN = None if count_N is None else np.arange(layout.k)[:, None] < count_N
        ids_NK = self._read_ids(pages, kept_KN)
        gaps_NK = self._read_gaps(pages, None if kept_KN is None else kept_KN[1:])
        top1, tail = pages.all().reshape(shape), pages.all().reshape(shape)
        slots_RT = pages.some(rows * (layout.row_tokens - 1)).reshape(rows, -1).astype(np.int64)
        tokens_RT = _tokens(ids_NK, slots_RT, pages)
        count_RT = None if count_N is None else count_N.reshape(shape)
        gaps_RTK = gaps_NK.reshape(*shape, layout.k - 1)
        predicted = derived.predict(layout.companding, top1, gaps_RTK, count_RT, slots_RT)
        lp_RT = np.empty(shape, U16)
        hits = int(predicted.among.sum())
        lp_RT[predicted.among] = pages.some(hits)
        lp_RT[~predicted.among] = pages.some(lp_RT.size - hits)
        coded.split(layout, raw_R, "token", tokens_RT)
        coded.split(layout, raw_R, "ids", ids_NK.reshape(*shape, -1))
        raw_R["gaps"], raw_R["flags"] = gaps_RTK, pages.all().reshape(shape)
        raw_R["top1"] = top1.view(np.float16)
        raw_R["tail"] = derived.restore(tail, predicted.tail).view(np.float16)
        raw_R["lp_next"] = derived.restore(lp_RT, predicted.lp_next).view(np.float16)
        if count_RT is not None:
            raw_R["kept"] = count_RT - 1
        if witness(raw_R) != _CRC.unpack_from(block)[0]:
            raise IntegrityError("tokens or lp_next of a block are not those that were captured")
        return raw_R

    def _read_ids(self, pages: _Pages, kept_KN: NDArray[np.bool_] | None) -> NDArray[Any]:
        start_N = self._ids.starts_C[pages.all()]
        ids_KN = np.empty((self.layout.k, len(start_N)), self._ids.ids.dtype)
        for group in _all_groups(self.layout)[0]:
            part_KN = ids_KN[group]
            if kept_KN is None:
                self._ids.decode(pages.some(part_KN.size).reshape(part_KN.shape), start_N, part_KN)
                continue
            kept = kept_KN[group]
            part_KN[...] = ids_KN[0]  # what does not count repeats the first entry
            start = np.broadcast_to(start_N, kept.shape)[kept]
            part_KN[kept] = self._ids.decode(pages.some(int(kept.sum())), start, np.empty(start.shape, ids_KN.dtype))
        return np.ascontiguousarray(ids_KN.T)

    def _read_gaps(self, pages: _Pages, kept_KN: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
        symbols_KN = np.zeros((self.layout.k - 1, pages.tokens), U16)
        for group in _all_groups(self.layout)[1]:
            part_KN = symbols_KN[group]
            if kept_KN is None:
                part_KN[...] = pages.some(part_KN.size).reshape(part_KN.shape)
            else:
                part_KN[kept_KN[group]] = pages.some(int(kept_KN[group].sum()))
        gaps_KN = gap_model.decode_gaps(self._gaps, symbols_KN)
        if kept_KN is not None:
            gaps_KN[~kept_KN] = 0
        return np.ascontiguousarray(gaps_KN.T)


@dataclass
class _Pages:
    """The pages of a block, one stream after another."""

    streams: Iterator[StreamDecoder]
    data: bytes
    tokens: int

    def some(self, count: int) -> Numbers:
        """The next stream's page, of `count` numbers."""
        numbers, self.data = next(self.streams).read(self.data, count)
        return numbers

    def all(self) -> Numbers:
        """The next stream's page, of a number a token."""
        return self.some(self.tokens)


def _tokens(ids_NK: NDArray[Any], slots_RT: NDArray[np.int64], pages: _Pages) -> NDArray[np.int64]:
    """Tokens: an entry of the position before, or spelled."""
    k = ids_NK.shape[1]
    spelled_RT = derived.spelled(slots_RT, k)
    entry_RT = np.arange(ids_NK.shape[0]).reshape(len(slots_RT), -1)[:, :-1] * k + np.minimum(slots_RT, k - 1)
    tokens_RT = np.zeros(spelled_RT.shape, np.int64)
    tokens_RT[:, 1:] = ids_NK.ravel()[entry_RT]
    tokens_RT[spelled_RT] = pages.some(int(spelled_RT.sum()))
    return tokens_RT
