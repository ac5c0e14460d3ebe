"""Entropy-coded streams of numbers: one histogram for a whole segment, pages that decode by themselves.

A stream is a chunk of pco (https://github.com/pcodec/pcodec), a coder of numbers by bins and ANS: its meta is the
histogram, its pages are the blocks of a segment. Numbers are unsigned, of 16 or 32 bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from lmdistill.errors import IntegrityError

Numbers = NDArray[Any]  # 1-D, u16 or u32
ZERO, ONE, SIGN = np.uint16(0), np.uint16(1), np.uint16(15)
LEVEL = 8  # up to 256 bins a histogram
_NAMES = {2: "u16", 4: "u32"}
_LENGTH = struct.Struct("<I")


def width_of(largest: int) -> np.dtype[Any]:
    """The narrower of the two types that holds `largest`."""
    return np.dtype("<u2" if largest < 2**16 else "<u4")


def zigzag(differences: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Differences modulo 2¹⁶, so that small ones of either sign are small numbers."""
    folded: NDArray[np.uint16] = (differences << ONE) ^ (ZERO - (differences >> SIGN))
    return folded


def unzigzag(numbers: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The differences that `zigzag` was given."""
    back: NDArray[np.uint16] = (numbers >> ONE) ^ (ZERO - (numbers & ONE))
    return back


def encode_stream(parts: Sequence[Numbers]) -> tuple[bytes, list[bytes]]:
    """(meta, a page for each part); an empty part is an empty page, a stream with nothing in it has no meta."""
    sizes = [part.size for part in parts if part.size]
    if not sizes:
        return b"", [b""] * len(parts)
    config = ChunkConfig(
        compression_level=LEVEL,
        delta_spec=DeltaSpec.no_op(),
        mode_spec=ModeSpec.classic(),
        paging_spec=PagingSpec.exact_page_sizes(sizes),
    )
    chunk = FileCompressor().chunk_compressor(np.concatenate([part.ravel() for part in parts]), config)
    pages = iter([chunk.write_page(index) for index in range(len(sizes))])
    return chunk.write_meta(), [next(pages) if part.size else b"" for part in parts]


class StreamDecoder:
    """Reads the pages of one stream."""

    def __init__(self, meta: bytes, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._chunk = _decompressor().chunk_decompressor(meta, _NAMES[dtype.itemsize])[0] if meta else None

    def read(self, data: bytes, numbers: Numbers) -> bytes:
        """Fill `numbers` from the page at the start of `data`; what follows the page."""
        if not numbers.size:
            return data
        if self._chunk is None:
            raise IntegrityError("a block has more in it than its segment's tables say")
        try:
            _, size = self._chunk.read_page_into(data, numbers.size, numbers)
        except RuntimeError as error:
            raise IntegrityError("a block does not fit its segment's tables", why=str(error)) from error
        return data[size:]


def pack_all(metas: Iterable[bytes]) -> bytes:
    """Several byte strings as one."""
    return b"".join(_LENGTH.pack(len(meta)) + meta for meta in metas)


def unpack_all(data: bytes) -> list[bytes]:
    """The byte strings that `pack_all` was given."""
    parts, place = [], 0
    while place < len(data):
        (size,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        parts.append(data[place : place + size])
        place += size
    return parts


def pack_numbers(numbers: Numbers) -> bytes:
    """One array by itself, with its length and width."""
    meta, (page,) = encode_stream([numbers])
    return pack_all([struct.pack("<BI", numbers.dtype.itemsize, numbers.size), meta, page])


def unpack_numbers(data: bytes) -> Numbers:
    """The array that `pack_numbers` was given."""
    head, meta, page = unpack_all(data)
    itemsize, size = struct.unpack("<BI", head)
    numbers = np.empty(size, f"<u{itemsize}")
    StreamDecoder(meta, numbers.dtype).read(page, numbers)
    return numbers


def _decompressor() -> FileDecompressor:
    return FileDecompressor.new(FileCompressor().write_header())[0]
