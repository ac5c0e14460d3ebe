"""What Q4_0 and Q5_0 share: one float16 scale a block, of either sign, which puts the extreme weight on a point.

Axes: N blocks, B weights in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lmdistill.quantization.arithmetic import inverse, signed_extreme
from lmdistill.quantization.one_step import OneStepGrid


@dataclass(frozen=True)
class SignedExtremeGrid(OneStepGrid):
    """Points (code − half) · d with 2 · half codes; d = extreme / −half, so that only one end has the last point."""

    half: ClassVar[int]
    either_sign = True
    block = 32

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """`d`, of either sign."""
        return {"d": torch.float16}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reference divides by the float32 scale, adds half a step and cuts off; then rounds the scale."""
        d_N1 = signed_extreme(blocks_NB, 1) / -self.half  # a power of two: exact on every device
        inverse_N1 = inverse(d_N1)
        # a scale without an inverse makes the C code convert infinities, which gives 0 on x86
        shift_N1 = (self.half + 0.5) * ((inverse_N1 != 0) | (d_N1 == 0))
        codes_NB = (blocks_NB * inverse_N1).add_(shift_N1).floor_().clamp_(max=2 * self.half - 1)
        return codes_NB, {"d": d_N1.squeeze(1).half()}
