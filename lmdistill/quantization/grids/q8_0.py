"""llama.cpp's Q8_0: 32 weights, a float16 scale, 255 points; 8.5 bits a weight.

Axes: N blocks, B weights in a block, Y bytes in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmdistill.quantization.arithmetic import divide, inverse, round_half_away
from lmdistill.quantization.grid import Scales
from lmdistill.quantization.one_step import OneStepGrid
from lmdistill.quantization.packing import raw, unraw
from lmdistill.quantization.registry import grid


@grid("q8_0")
@dataclass(frozen=True)
class Q8_0(OneStepGrid):
    """Points code · d, codes from −127 to 127. Error at most d / 2 and what float16 makes of the largest weight."""

    code_dtype = torch.int8
    least, most = -127, 127
    block = 32
    code_bits = 8
    block_bytes = 34

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The step `d`."""
        return {"d": torch.float16}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The largest magnitude becomes 127; halves are rounded away from zero."""
        largest_N1 = torch.maximum(blocks_NB.amax(1, keepdim=True), -blocks_NB.amin(1, keepdim=True))
        d_N1 = divide(largest_N1.abs(), 127.0)  # +0 for zeros
        return round_half_away(blocks_NB * inverse(d_N1)), {"d": d_N1.squeeze(1).half()}

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Scale, then the codes."""
        return torch.cat((raw(scales["d"]), raw(codes_NB)), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return unraw(bytes_NY[:, 2:], torch.int8), {"d": unraw(bytes_NY[:, :2], torch.float16)}
