"""llama.cpp's Q4_1: 32 weights, a float16 scale and a float16 minimum, 16 points; 5 bits a weight.

Axes: N blocks, B weights in a block, Y bytes in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmdistill.quantization.arithmetic import divide, first_minimum, inverse
from lmdistill.quantization.grid import Grid, Scales
from lmdistill.quantization.packing import from_nibbles, nibbles, raw, unraw
from lmdistill.quantization.registry import grid


@grid("q4_1")
@dataclass(frozen=True)
class Q4_1(Grid):
    """Points code · d + m. Error at most d / 2 and what float16 makes of the block's ends."""

    block = 32
    code_bits = 4
    block_bytes = 20

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The step `d` and the minimum `m`."""
        return {"d": torch.float16, "m": torch.float16}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Steps are counted from the float32 minimum with the float32 scale, before either is rounded."""
        low_N1, high_N1 = first_minimum(blocks_NB, 1), blocks_NB.amax(1, keepdim=True)
        d_N1 = divide((high_N1 - low_N1).add_(0.0), 15.0)  # zeros of either sign are +0 apart
        # where d has no inverse, the C code's 0 · ∞ and ∞ become 0 on x86, as they do here
        codes_NB = (blocks_NB - low_N1).mul_(inverse(d_N1)).add_(0.5).floor_().clamp_(max=15)
        return codes_NB, {"d": d_N1.squeeze(1).half(), "m": low_N1.squeeze(1).half()}

    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """A scale of zero leaves only the point m."""
        d_N1, m_N1 = (scales[name].float().unsqueeze(1) for name in ("d", "m"))
        steps_NB = torch.where(d_N1 == 0, 0.0, (blocks_NB - m_N1) / d_N1)
        return steps_NB.round_().clamp_(0, 15)

    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """A product and a sum, each rounded."""
        return codes_NB * scales["d"].float().unsqueeze(1) + scales["m"].float().unsqueeze(1)

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Scale, minimum, then nibbles."""
        return torch.cat((raw(scales["d"]), raw(scales["m"]), nibbles(codes_NB)), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        d_N, m_N = unraw(bytes_NY[:, :2], torch.float16), unraw(bytes_NY[:, 2:4], torch.float16)
        return from_nibbles(bytes_NY[:, 4:]), {"d": d_N, "m": m_N}
