"""What gap code follows what: codes ascend along a token's entries, and a teacher's steps repeat.

Axes: N tokens of a segment, K entries of a token (K−1 codes), P previous code, D difference to it, S symbol.
A code is given by the place of its difference among those that usually follow the previous code. In bfloat16 logits lie
on a grid, so few differences occur: 10 bytes at K = 32 where the differences alone take 12.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.codec import CODES
from lmdistill.signals.packing.streams import pack_numbers, unpack_numbers

Bytes = NDArray[np.uint8]


def _before(gaps_NK: Bytes) -> Bytes:
    """The code before each code; 0 before the first."""
    before = np.zeros_like(gaps_NK)
    before[:, 1:] = gaps_NK[:, :-1]
    return before


@dataclass(frozen=True)
class GapModel:
    """How usual each difference is after each code, by powers of two."""

    levels_PD: NDArray[np.uint16]

    @classmethod
    def build(cls, gaps_NK: Bytes, kept_NK: NDArray[np.bool_] | None) -> GapModel:
        """Count a segment's codes (those of kept entries)."""
        before = _before(gaps_NK)
        pairs = before.astype(np.int64) * CODES + (gaps_NK - before)
        counts = np.bincount(pairs.ravel() if kept_NK is None else pairs[kept_NK], minlength=CODES * CODES)
        levels: NDArray[np.uint16] = np.frexp(counts.astype(np.float64))[1].astype(np.uint16)  # 0 for none
        return cls(levels.reshape(CODES, CODES))

    def to_bytes(self) -> bytes:
        """The levels, up to the last difference that occurs."""
        width = int(np.flatnonzero(self.levels_PD.any(axis=0)).max(initial=0)) + 1
        return pack_numbers(np.ascontiguousarray(self.levels_PD[:, :width]).ravel())

    @classmethod
    def from_bytes(cls, data: bytes) -> GapModel:
        """Back from `to_bytes`."""
        levels_PD = np.zeros((CODES, CODES), np.uint16)
        stored = unpack_numbers(data).reshape(CODES, -1)
        levels_PD[:, : stored.shape[1]] = stored
        return cls(levels_PD)

    def encode(self, gaps_NK: Bytes) -> Bytes:
        """A symbol for each code."""
        order_PS = self._differences()
        place_PD = np.empty_like(order_PS)
        np.put_along_axis(place_PD, order_PS.astype(np.int64), np.arange(CODES, dtype=np.uint8)[None], axis=1)
        before = _before(gaps_NK)
        symbols: Bytes = place_PD[before, gaps_NK - before]
        return symbols

    def table(self) -> NDArray[np.uint16]:
        """256 times the code for (256 times the previous code) + symbol, `[256·256]`, for `decode_gaps`."""
        codes: Bytes = self._differences() + np.arange(CODES, dtype=np.uint8)[:, None]
        return codes.ravel().astype(np.uint16) << np.uint16(8)

    def _differences(self) -> Bytes:
        """Differences after each code, the most usual first, of equals the smaller first: `[P, S]`."""
        return np.argsort(-self.levels_PD.astype(np.int16), axis=1, kind="stable").astype(np.uint8)


def decode_gaps(table: NDArray[np.uint16], symbols_KN: NDArray[np.uint16]) -> Bytes:
    """The codes of symbols, entry after entry; each step goes over all tokens at once. Overwrites the symbols."""
    before_N = np.zeros(symbols_KN.shape[1], np.uint16)
    for symbol_N in symbols_KN:
        before_N = table.take(before_N | symbol_N, out=symbol_N, mode="clip")
    return (symbols_KN >> np.uint16(8)).astype(np.uint8)
