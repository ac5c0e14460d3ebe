"""mmap: coded rows one after another, no header: a fixed stride, memory-mapped, random access by row.

Axes: R rows, T tokens in a row. Row r of a shard begins at byte r · (bytes of a row).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.format import Layout
from lmdistill.signals.variant import Block, Memory, Variant, variant

BLOCK_BYTES = 65_536  # a flipped byte is located to about this many bytes


@variant("mmap")
class MmapVariant(Variant):
    """Fastest to read: decoding is a look-up."""

    access = "row"

    def bytes_bound(self, layout: Layout) -> int:
        """The stride: 104 at K = 32 and a vocabulary of at most 65,536."""
        return self.dtype(replace(layout, row_tokens=1)).itemsize

    def packer(self, layout: Layout) -> MmapPacker:
        """Rows as they are."""
        return MmapPacker(self.block_rows(layout))

    def open(self, path: Path, layout: Layout, rows: int, memory: Memory) -> MappedRows:
        """Map the shard."""
        return MappedRows(path, rows, memory)

    def block_rows(self, layout: Layout) -> int:
        """Rows under one crc32."""
        return max(1, BLOCK_BYTES // self.dtype(layout).itemsize)

    def blocks(self, layout: Layout, rows: int, record: dict[str, Any]) -> Iterator[Block]:
        """Equal stretches of whole rows."""
        step, size = self.block_rows(layout), self.dtype(layout).itemsize
        for first, crc in zip(range(0, rows, step), record["crc32"], strict=True):
            stop = min(first + step, rows)
            yield Block(range(first, stop), first * size, stop * size, crc)


class MmapPacker:
    """Cuts the rows into blocks of `block_rows`."""

    def __init__(self, block_rows: int) -> None:
        self.block_rows, self._waiting = block_rows, bytearray()

    def add(self, raw_R: NDArray[Any]) -> list[bytes]:
        """Take the next rows; the blocks that are full."""
        self._waiting += raw_R.tobytes()
        size = self.block_rows * raw_R.dtype.itemsize
        full = len(self._waiting) // size * size
        ready = [bytes(self._waiting[start : start + size]) for start in range(0, full, size)]
        del self._waiting[:full]
        return ready

    def finish(self) -> list[bytes]:
        """The last block, if it is not full."""
        return [bytes(self._waiting)] if self._waiting else []

    def index(self) -> dict[str, Any]:
        """Nothing: blocks are where the stride says."""
        return {}


class MappedRows:
    """A shard's rows in memory that the system pages in and out."""

    def __init__(self, path: Path, rows: int, memory: Memory) -> None:
        self._path, self._files = path, memory.files
        self._rows = self._files.open(path).reshape(rows, -1)

    def copy_rows(self, rows: Sequence[int], out: Sequence[NDArray[np.uint8]]) -> None:
        """Copy rows."""
        for row, place in zip(rows, out, strict=True):
            place[...] = self._rows[row]
        self._files.note(self._path, len(rows) * self._rows.shape[1])
