"""A segment of coded rows as bytes: its tables, then blocks of rows that decode by themselves with those tables.

Axes: R rows, T tokens in a row, K entries of a token, N tokens of a block (R·T).
Streams of a block, in this order: class, candidates' symbols, gap symbols, top-1, tail, slots, tokens, lp_next, flags;
where the number of entries varies, it comes first. Entries of like rank share a histogram.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
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
    """Entries that share a stream: the first, the second, then ever more, as ranks matter less and less."""
    found, first = [], 0
    while first < stop:
        width = max(1, min(first, PAGE_NUMBERS // row_tokens))
        found.append(slice(first, min(first + width, stop)))
        first += width
    return found


def stream_types(layout: Layout, symbol: np.dtype[Any]) -> list[np.dtype[Any]]:
    """The number type of each stream, in order."""
    id_groups, gap_groups = _all_groups(layout)
    token = width_of(layout.vocab_size)
    kept = [U16] if layout.variable else []
    return [*kept, U16, *[symbol] * len(id_groups), *[U16] * len(gap_groups), U16, U16, U16, token, U16, U16, U16]


@dataclass(frozen=True)
class Column:
    """One stream's values over all rows, and which of them are stored; None for all."""

    name: str
    values: NDArray[Any]
    keep: NDArray[np.bool_] | None = None

    def part(self, rows: slice, dtype: np.dtype[Any]) -> Numbers:
        """A block's numbers, entry by entry: all tokens' first, then all tokens' second."""
        part = self.values[rows].reshape(-1, *self.values.shape[2:]).T
        if self.keep is not None:
            part = part[self.keep[rows].reshape(-1, *self.keep.shape[2:]).T]
        return part.astype(dtype).ravel()


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


@dataclass(frozen=True)
class Encoded:
    """A segment's models and streams."""

    ids: id_model.IdModel
    gaps: gap_model.GapModel
    columns: list[Column]
    streams: list[tuple[bytes, list[bytes]]]  # of each column its histogram, and a page for each block

    def tables(self) -> bytes:
        """What all blocks need."""
        return pack_all([self.ids.to_bytes(), self.gaps.to_bytes(), pack_all(meta for meta, _ in self.streams)])

    def sizes(self) -> dict[str, int]:
        """Bytes by what they say."""
        found = {"id tables": len(self.ids.to_bytes()), "gap table": len(self.gaps.to_bytes())}
        for column, (meta, pages) in zip(self.columns, self.streams, strict=True):
            found[column.name] = found.get(column.name, 0) + len(meta) + sum(map(len, pages))
        return found


def encode(layout: Layout, raw_R: NDArray[Any], block_rows: int) -> Encoded:
    """Model a segment's coded rows and encode them by blocks of `block_rows` rows."""
    planes, shape = Planes.of(layout, raw_R), raw_R["token"].shape
    tokens = shape[0] * shape[1]
    kept_NK = None if planes.kept_RTK is None else planes.kept_RTK.reshape(tokens, layout.k)
    ids_NK, gaps_NK = planes.ids_RTK.reshape(tokens, layout.k), raw_R["gaps"].reshape(tokens, layout.k - 1)
    ids, class_N = id_model.build(ids_NK, planes.tokens_RT.ravel(), kept_NK, layout.vocab_size)
    gaps = gap_model.GapModel.build(gaps_NK, None if kept_NK is None else kept_NK[:, 1:])
    symbols = ids.encode(ids_NK, class_N).reshape(*shape, layout.k), gaps.encode(gaps_NK).reshape(*shape, layout.k - 1)
    columns = list(_columns(layout, planes, class_N.reshape(shape), *symbols))
    blocks = [slice(start, start + block_rows) for start in range(0, len(raw_R), block_rows)]
    types = stream_types(layout, ids.symbol_dtype)
    streams = [
        encode_stream([column.part(rows, dtype) for rows in blocks])
        for column, dtype in zip(columns, types, strict=True)
    ]
    return Encoded(ids, gaps, columns, streams)


def encode_segment(layout: Layout, raw_R: NDArray[Any], block_rows: int) -> list[bytes]:
    """The tables of a segment, then its blocks of `block_rows` rows."""
    encoded = encode(layout, raw_R, block_rows)
    blocks = zip(range(0, len(raw_R), block_rows), *(pages for _, pages in encoded.streams), strict=True)
    return [
        encoded.tables(),
        *(_CRC.pack(witness(raw_R[start : start + block_rows])) + b"".join(pages) for start, *pages in blocks),
    ]


def _columns(
    layout: Layout, planes: Planes, class_RT: NDArray[Any], ids_RTK: NDArray[Any], gaps_RTK: NDArray[Any]
) -> Iterator[Column]:
    """Every stream of a segment, in the order of `stream_types`."""
    raw_R, kept_RTK = planes.raw_R, planes.kept_RTK
    if layout.variable:
        yield Column("count", raw_R["kept"])
    yield Column("class", class_RT)
    id_groups, gap_groups = _all_groups(layout)
    for group in id_groups:
        yield Column("ids", ids_RTK[..., group], None if kept_RTK is None else kept_RTK[..., group])
    for group in gap_groups:
        yield Column("gaps", gaps_RTK[..., group], None if kept_RTK is None else kept_RTK[..., 1:][..., group])
    slots_RT = derived.slots(planes.tokens_RT, planes.ids_RTK, kept_RTK)
    top1, tail, lp_next = (np.ascontiguousarray(raw_R[name]).view(U16) for name in ("top1", "tail", "lp_next"))
    count_RT = None if kept_RTK is None else kept_RTK.sum(axis=-1)
    gaps_KN = np.ascontiguousarray(raw_R["gaps"].reshape(top1.size, layout.k - 1).T)
    predicted = derived.predict(layout.companding, top1, gaps_KN, count_RT, slots_RT)
    yield Column("top1", top1)
    yield Column("tail", derived.residual(tail, predicted.tail))
    yield Column("tokens", slots_RT)
    yield Column("tokens", planes.tokens_RT, derived.spelled(slots_RT, layout.k))
    lp_residual = derived.residual(lp_next, predicted.lp_next)
    yield Column("lp_next", lp_residual, predicted.among)
    yield Column("lp_next", lp_residual, ~predicted.among)
    yield Column("flags", raw_R["flags"])


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

    def decode(self, blocks: Sequence[bytes], rows: Sequence[int]) -> NDArray[Any]:
        """The coded rows of blocks, each of so many rows, one after another.

        Decoding many at once is several times faster than one by one. Raises IntegrityError where what is derived is
        not what was captured.
        """
        layout, shape = self.layout, (sum(rows), self.layout.row_tokens)
        raw_R = np.empty(shape[0], coded.row_dtype(layout))
        pages = _Pages(iter(self._streams), [block[_CRC.size :] for block in blocks], rows, layout.row_tokens)
        count_N = pages.all().astype(np.int64) + 1 if layout.variable else None
        kept_KN = None if count_N is None else np.arange(layout.k)[:, None] < count_N
        ids_KN = self._read_ids(pages, kept_KN)
        gaps_KN = self._read_gaps(pages, None if kept_KN is None else kept_KN[1:])
        top1, tail = pages.all().reshape(shape), pages.all().reshape(shape)
        slots_RT = pages.of(np.ones((shape[0], shape[1] - 1), bool)).reshape(shape[0], -1).astype(np.int64)
        coded.split(layout, raw_R, "token", _tokens(ids_KN, slots_RT, pages))
        coded.split(layout, raw_R, "ids", ids_KN.T.reshape(*shape, layout.k))
        raw_R["gaps"] = gaps_KN.T.reshape(*shape, layout.k - 1)
        count_RT = None if count_N is None else count_N.reshape(shape)
        predicted = derived.predict(layout.companding, top1, gaps_KN, count_RT, slots_RT)
        lp_RT = np.empty(shape, U16)
        for which_RT in (predicted.among, ~predicted.among):
            lp_RT[which_RT] = pages.of(which_RT)
        raw_R["flags"] = pages.all().reshape(shape)
        raw_R["top1"] = top1.view(np.float16)
        raw_R["tail"] = derived.restore(tail, predicted.tail).view(np.float16)
        raw_R["lp_next"] = derived.restore(lp_RT, predicted.lp_next).view(np.float16)
        if count_RT is not None:
            raw_R["kept"] = count_RT - 1
        for block, (start, stop) in zip(blocks, pages.spans, strict=True):
            if witness(raw_R[start:stop]) != _CRC.unpack_from(block)[0]:
                raise IntegrityError("tokens or lp_next of a block are not those that were captured")
        return raw_R

    def _read_ids(self, pages: _Pages, kept_KN: NDArray[np.bool_] | None) -> NDArray[Any]:
        start_N = self._ids.starts_C[pages.all()]
        symbols_KN = pages.entries(_all_groups(self.layout)[0], self.layout.k, kept_KN)
        ids_KN = self._ids.decode(symbols_KN, start_N)
        if kept_KN is not None:
            ids_KN = np.where(kept_KN, ids_KN, ids_KN[0])  # what does not count repeats the first entry
        return ids_KN

    def _read_gaps(self, pages: _Pages, kept_KN: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
        symbols_KN = pages.entries(_all_groups(self.layout)[1], self.layout.k - 1, kept_KN)
        gaps_KN = gap_model.decode_gaps(self._gaps, symbols_KN)
        if kept_KN is not None:
            gaps_KN[~kept_KN] = 0
        return gaps_KN


class _Pages:
    """The pages of several blocks, one stream after another."""

    def __init__(self, streams: Iterator[StreamDecoder], data: list[bytes], rows: Sequence[int], length: int) -> None:
        self._streams, self._data, self._length = streams, data, length
        self.spans = list(pairwise(itertools.accumulate(rows, initial=0)))  # of rows, a block each

    def of(self, which_RT: NDArray[np.bool_]) -> Numbers:
        """The next stream's pages: a number for each position that is True."""
        return self._read([int(np.count_nonzero(which_RT[start:stop])) for start, stop in self.spans])

    def all(self) -> Numbers:
        """The next stream's pages: a number a token."""
        return self._read([(stop - start) * self._length for start, stop in self.spans])

    def entries(self, groups: list[slice], k: int, kept_KN: NDArray[np.bool_] | None) -> Numbers:
        """The next streams' pages, a group of entries each, `[K, N]`; 0 where an entry does not count."""
        streams = [next(self._streams) for _ in groups]
        found_KN = np.zeros((k, self.spans[-1][1] * self._length), streams[0].dtype if streams else U16)
        for group, stream in zip(groups, streams, strict=True):
            for block, (start, stop) in enumerate(self.spans):
                tokens = slice(start * self._length, stop * self._length)
                part_KN = found_KN[group, tokens]
                kept = None if kept_KN is None else kept_KN[group, tokens]
                numbers = np.empty(part_KN.shape if kept is None else int(np.count_nonzero(kept)), stream.dtype)
                self._data[block] = stream.read(self._data[block], numbers.reshape(-1))
                part_KN[... if kept is None else kept] = numbers
        return found_KN

    def _read(self, counts: list[int]) -> Numbers:
        stream, place = next(self._streams), 0
        numbers = np.empty(sum(counts), stream.dtype)
        for block, count in enumerate(counts):
            self._data[block] = stream.read(self._data[block], numbers[place : place + count])
            place += count
        return numbers


def _tokens(ids_KN: NDArray[Any], slots_RT: NDArray[np.int64], pages: _Pages) -> NDArray[np.int64]:
    """Tokens: an entry of the position before, or spelled."""
    k, tokens = ids_KN.shape
    spelled_RT = derived.spelled(slots_RT, k)
    before_RT = np.arange(tokens).reshape(len(slots_RT), -1)[:, :-1]
    tokens_RT = np.empty(spelled_RT.shape, np.int64)
    tokens_RT[:, 1:] = ids_KN.ravel()[np.minimum(slots_RT, k - 1) * tokens + before_RT]
    tokens_RT[spelled_RT] = pages.of(spelled_RT)
    return tokens_RT
