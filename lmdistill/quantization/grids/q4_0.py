"""llama.cpp's Q4_0: 32 weights, a float16 scale of either sign, 16 points; 4.5 bits a weight.

Axes: N blocks, B weights in a block, Y bytes in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmdistill.quantization.grid import Scales
from lmdistill.quantization.packing import from_nibbles, nibbles, raw, unraw
from lmdistill.quantization.registry import grid
from lmdistill.quantization.signed_extreme import SignedExtremeGrid


@grid("q4_0")
@dataclass(frozen=True)
class Q4_0(SignedExtremeGrid):
    """Points (code − 8) · d. Error at most |d|, at the end without a point; half of it elsewhere."""

    half = zero = 8
    least, most = -8, 7
    code_bits = 4
    block_bytes = 18

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Scale, then nibbles."""
        return torch.cat((raw(scales["d"]), nibbles(codes_NB)), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return from_nibbles(bytes_NY[:, 2:]), {"d": unraw(bytes_NY[:, :2], torch.float16)}
