"""compact: entropy-coded blocks of rows under the tables of their segment; random access by block.

Axes: R rows, T tokens in a row.
A shard is segments one after another; a segment is its tables and then its blocks, each under its own crc32. The
record has their lengths (`block_bytes`). What does not compress is stored as it is, under tables of no bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError
from lmdistill.signals.format import Layout, record_name
from lmdistill.signals.packing.segment import SegmentDecoder, encode_segment
from lmdistill.signals.variant import Block, Memory, Variant, variant

BLOCK_TOKENS = 256  # decoded to read one row: more save 1% of the bytes, and cost as often as they are not wanted
TOGETHER = 4096  # tokens whose blocks are decoded at once: more would leave the processor's cache
SEGMENT_BYTES = 2**24  # of coded rows that share tables: what a writer holds in memory


@variant("compact")
class CompactVariant(Variant):
    """Half the bytes of mmap at a tenth of its speed."""

    access = "block"

    def bytes_bound(self, layout: Layout) -> int:
        """A coded row's bytes: it is never more."""
        return self.dtype(replace(layout, row_tokens=1)).itemsize

    def packer(self, layout: Layout) -> SegmentPacker:
        """Rows by segments."""
        return SegmentPacker(layout, self)

    def encode(self, layout: Layout, raw_R: NDArray[Any], block_rows: int) -> list[bytes]:
        """A segment's tables, then its blocks."""
        return encode_segment(layout, raw_R, block_rows)

    def decoder(self, layout: Layout, tables: bytes) -> SegmentDecoder:
        """What decodes the blocks of a segment."""
        return SegmentDecoder(layout, tables)

    def open(self, path: Path, layout: Layout, rows: int, memory: Memory) -> PackedRows:
        """Read the shard's record."""
        return PackedRows(path, layout, self, rows, memory)

    def blocks(self, layout: Layout, rows: int, record: dict[str, Any]) -> Iterator[Block]:
        """Tables and blocks of each segment."""
        ends = np.cumsum([0, *record["block_bytes"]]).tolist()
        contents = Geometry(layout, self.dtype(layout)).contents(rows)
        for content, crc, (start, stop) in zip(contents, record["crc32"], pairwise(ends), strict=True):
            yield Block(content, start, stop, crc)


class Geometry:
    """Rows of a block and of a segment: fixed by the layout."""

    def __init__(self, layout: Layout, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.block_rows = max(1, BLOCK_TOKENS // layout.row_tokens)
        self.segment_rows = self.block_rows * max(1, SEGMENT_BYTES // (dtype.itemsize * self.block_rows))

    def contents(self, rows: int) -> Iterator[range | None]:
        """What each block of a shard holds; None for tables."""
        for first in range(0, rows, self.segment_rows):
            yield None
            stop = min(first + self.segment_rows, rows)
            for row in range(first, stop, self.block_rows):
                yield range(row, min(row + self.block_rows, stop))


class SegmentPacker:
    """Gathers the rows of a segment, then encodes them."""

    def __init__(self, layout: Layout, coder: CompactVariant) -> None:
        self.layout, self._coder = layout, coder
        self.geometry = Geometry(layout, coder.dtype(layout))
        self._rows = np.empty(self.geometry.segment_rows, self.geometry.dtype)
        self._have, self._sizes = 0, list[int]()

    def add(self, raw_R: NDArray[Any]) -> list[bytes]:
        """Take the next rows; the blocks of segments that are full."""
        ready = []
        while len(raw_R):
            taken = raw_R[: self.geometry.segment_rows - self._have]
            self._rows[self._have : self._have + len(taken)] = taken
            self._have, raw_R = self._have + len(taken), raw_R[len(taken) :]
            if self._have == self.geometry.segment_rows:
                ready += self._encode()
        return ready

    def finish(self) -> list[bytes]:
        """The blocks of the last segment."""
        return self._encode() if self._have else []

    def index(self) -> dict[str, Any]:
        """The length of every block."""
        return {"block_bytes": self._sizes}

    def _encode(self) -> list[bytes]:
        rows, step = self._rows[: self._have], self.geometry.block_rows
        blocks = self._coder.encode(self.layout, rows, step)
        if not pays(blocks, rows):
            blocks = [b"", *(rows[start : start + step].tobytes() for start in range(0, len(rows), step))]
        self._sizes += map(len, blocks)
        self._have = 0
        return blocks


def pays(blocks: list[bytes], rows: NDArray[Any]) -> bool:
    """Whether encoded blocks are smaller than the rows they hold."""
    return sum(map(len, blocks)) < rows.nbytes


class PackedRows:
    """A shard's rows, decoded by blocks; tables and blocks lately used stay in `memory`."""

    def __init__(self, path: Path, layout: Layout, coder: CompactVariant, rows: int, memory: Memory) -> None:
        record = _record(path)
        self.path, self.layout, self._coder, self._rows, self._memory = path, layout, coder, rows, memory
        self._ends = np.cumsum([0, *record["block_bytes"]])
        self._crcs = np.array(record["crc32"], np.uint32)
        self._geometry = Geometry(layout, coder.dtype(layout))
        self._stride = 1 + self._geometry.segment_rows // self._geometry.block_rows  # tables and blocks of a segment

    def copy_rows(self, rows: Sequence[int], out: Sequence[NDArray[np.uint8]]) -> None:
        """Copy rows out of their blocks; those that are not in memory are decoded together."""
        step = max(1, TOGETHER // self.layout.row_tokens)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            places = [self._place(row) for row in part]
            blocks = self._blocks(sorted({block for block, _ in places}))
            for (block, offset), place in zip(places, out[start : start + step], strict=True):
                place[...] = blocks[block][offset]

    def _place(self, row: int) -> tuple[int, int]:
        """A row's block, counted over blocks and tables, and its place there."""
        segment, within = divmod(row, self._geometry.segment_rows)
        block, offset = divmod(within, self._geometry.block_rows)
        return segment * self._stride + 1 + block, offset

    def _blocks(self, wanted: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """The bytes of blocks' coded rows, `[R, bytes of a row]` each."""
        found = {block: kept for block in wanted if (kept := self._memory.blocks.find((self.path, block))) is not None}
        missing = [block for block in wanted if block not in found]
        for segment, blocks in groupby(missing, lambda block: block // self._stride):
            for block, decoded in self._decode(segment * self._stride, list(blocks)):
                found[block] = self._memory.blocks.keep((self.path, block), decoded)
        return found

    def _decode(self, tables: int, blocks: list[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        data, rows = [self._read(block) for block in blocks], [self._rows_of(tables, block) for block in blocks]
        if self._ends[tables] == self._ends[tables + 1]:
            stored = np.frombuffer(b"".join(data), np.uint8)
        else:
            key = (self.path, tables)
            decoder = self._memory.tables.find(key) or self._memory.tables.keep(
                key, self._coder.decoder(self.layout, self._read(tables))
            )
            stored = decoder.decode(data, rows).view(np.uint8)
        parts = np.split(stored.reshape(sum(rows), -1), np.cumsum(rows)[:-1])
        return zip(blocks, (part.copy() for part in parts), strict=True)

    def _rows_of(self, tables: int, block: int) -> int:
        """How many rows a block holds: fewer at a shard's end."""
        first = tables // self._stride * self._geometry.segment_rows
        first += (block - tables - 1) * self._geometry.block_rows
        return min(self._geometry.block_rows, self._rows - first)

    def _read(self, block: int) -> bytes:
        start, stop = int(self._ends[block]), int(self._ends[block + 1])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if zlib.crc32(data) != self._crcs[block]:
            raise IntegrityError(
                f"shard {self.path} is damaged",
                why=f"{self.path.name}: bytes {start}–{stop - 1}: crc32 differs",
                fix="delete that shard's files and run the teach stage again: it alone is recomputed",
            )
        return data


def _record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path.parent / record_name(path.name)).read_bytes())
    return record
