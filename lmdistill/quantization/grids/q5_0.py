"""llama.cpp's Q5_0: 32 weights, a float16 scale of either sign, 32 points; 5.5 bits a weight.

Axes: N blocks, B weights in a block, Y bytes in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmdistill.quantization.grid import Scales
from lmdistill.quantization.packing import bit_string, from_bit_string, from_nibbles, nibbles, raw, unraw
from lmdistill.quantization.registry import grid
from lmdistill.quantization.signed_extreme import SignedExtremeGrid


@grid("q5_0")
@dataclass(frozen=True)
class Q5_0(SignedExtremeGrid):
    """Points (code − 16) · d. Error at most |d|, at the end without a point; half of it elsewhere."""

    half = zero = 16
    least, most = -16, 15
    code_bits = 5
    block_bytes = 22

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Scale, the 32 fifth bits, then nibbles."""
        return torch.cat((raw(scales["d"]), bit_string(codes_NB >> 4, 1), nibbles(codes_NB & 0x0F)), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        fifth_NB = from_bit_string(bytes_NY[:, 2:6], 1, self.block)
        codes_NB = from_nibbles(bytes_NY[:, 6:]) | (fifth_NB << 4)
        return codes_NB, {"d": unraw(bytes_NY[:, :2], torch.float16)}
