"""Uniform points between the least and the largest weight of each bucket (Polino et al., ICLR 2018, section 2).

Axes: N buckets, B weights in a bucket, Y bytes in a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lmdistill.errors import RecipeError
from lmdistill.quantization.arithmetic import divide
from lmdistill.quantization.grid import Grid, Scales
from lmdistill.quantization.packing import bit_string, from_bit_string, raw, unraw
from lmdistill.quantization.registry import grid

LIES = 1e-4  # of a step


@grid("uniform")
@dataclass(frozen=True)
class Uniform(Grid):
    """Points alpha · code / (2^bits − 1) + beta. Error at most half a step; a whole one with stochastic rounding.

    Stochastic rounding is unbiased and draws from torch's own generator, so that two calls give different codes.
    """

    bits: int = 4
    bucket: int = 64
    stochastic: bool = False

    def __post_init__(self) -> None:
        """Raise RecipeError for bits outside 1…8 or an empty bucket."""
        if not 1 <= self.bits <= 8 or self.bucket < 1:
            raise RecipeError(f"grid '{self.name}' takes 1 to 8 bits and buckets of at least one weight")

    @property
    def block(self) -> int:
        """Weights in a bucket."""
        return self.bucket

    @property
    def code_bits(self) -> int:
        """As asked for."""
        return self.bits

    @property
    def block_bytes(self) -> int:
        """Two float32 and the codes, rounded up to whole bytes."""
        return 8 + -(-self.bucket * self.bits // 8)

    @property
    def repeats(self) -> bool:
        """Not where it draws."""
        return not self.stochastic

    def settled(self) -> Uniform:
        """Nearest points: a resumed training ends where it would have ended, and no weight a whole step away."""
        return replace(self, stochastic=False)

    @property
    def _top(self) -> float:
        return float(2**self.bits - 1)

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The range `alpha` and the least weight `beta`."""
        return {"alpha": torch.float32, "beta": torch.float32}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The bucket's own range."""
        beta_N = blocks_NB.amin(1)
        scales = {"alpha": blocks_NB.amax(1) - beta_N, "beta": beta_N}
        return self.nearest(blocks_NB, scales), scales

    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Nearest, or with stochastic rounding one of the two neighbours; a range of zero leaves only `beta`."""
        alpha_N1, beta_N1 = scales["alpha"].unsqueeze(1), scales["beta"].unsqueeze(1)
        steps_NB = torch.where(alpha_N1 == 0, 0.0, (blocks_NB - beta_N1) / alpha_N1).mul_(self._top)
        if self.stochastic:
            nearest_NB = steps_NB.round()
            lies_NB = (steps_NB - nearest_NB).abs() <= LIES  # a point stays one: its quotient is rounded, too
            steps_NB = torch.where(lies_NB, nearest_NB, steps_NB.add_(torch.rand_like(steps_NB)).floor_())
        return steps_NB.round_().clamp_(0, self._top)

    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """In the paper's order of operations."""
        scaled_NB = divide(codes_NB * scales["alpha"].unsqueeze(1), self._top)
        return scaled_NB + scales["beta"].unsqueeze(1)

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Range, least weight, codes."""
        return torch.cat((raw(scales["alpha"]), raw(scales["beta"]), bit_string(codes_NB, self.bits)), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        alpha_N, beta_N = unraw(bytes_NY[:, :4], torch.float32), unraw(bytes_NY[:, 4:8], torch.float32)
        return from_bit_string(bytes_NY[:, 8:], self.bits, self.bucket), {"alpha": alpha_N, "beta": beta_N}
