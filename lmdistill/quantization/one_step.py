"""What grids share whose points are whole multiples of one scale a block: a short way from weights to points.

Training goes this way in every step, so it is in as few passes over the weights as keep each operation's rounding.

Axes: N blocks, B weights in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lmdistill.quantization.grid import REACH, Grid, Scales


@dataclass(frozen=True)
class OneStepGrid(Grid):
    """Points (code − zero) · d, from `least` to `most` steps."""

    least: ClassVar[int]
    most: ClassVar[int]
    zero: ClassVar[int] = 0  # the code of the point 0

    def _in_steps(self, blocks_NB: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights by their block's scale, and the scale `[N, 1]`; one of zero leaves only the point 0."""
        d_N1 = scales["d"].float().unsqueeze(1)
        return blocks_NB / torch.where(d_N1 == 0, torch.inf, d_N1), d_N1

    def nearest(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Halves go to the even point."""
        steps_NB, _ = self._in_steps(blocks_NB, scales)
        return steps_NB.round_().clamp_(self.least, self.most).add_(float(self.zero))

    def points(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """One product, rounded once (exact with float16 scales but for overflow: 11 bits times 4 to 8)."""
        steps_NB = codes_NB - self.zero if self.zero else codes_NB
        return steps_NB * scales["d"].float().unsqueeze(1)

    def nearest_points(self, blocks_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The same points, without codes between."""
        steps_NB, d_N1 = self._in_steps(blocks_NB, scales)
        return steps_NB.round_().clamp_(self.least, self.most).add_(0.0).mul_(d_N1)

    def scale_gradients(
        self, grad_NB: torch.Tensor, weights_NB: torch.Tensor, scales: Scales, names: tuple[str, ...]
    ) -> list[torch.Tensor]:
        """LSQ's, written out: between the ends what rounding added, beyond them the end."""
        steps_NB, d_N1 = self._in_steps(weights_NB, scales)
        codes_NB = steps_NB.round().clamp_(self.least, self.most)
        added_NB = torch.sub(codes_NB, steps_NB, out=steps_NB)
        answer_NB = torch.where(added_NB.abs() <= REACH, added_NB, codes_NB)
        return [answer_NB.mul_(grad_NB).sum(1) * (d_N1 != 0).squeeze(1) for _ in names]
