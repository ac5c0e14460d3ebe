"""Hidden states: squared error, relative to the teacher's state or plain.

Axes: R rows, T positions, D width.
"""

from __future__ import annotations

import torch

from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.projection import OPTIONS, projection
from lmdistill.intermediate.registry import Positions, Sides, intermediate
from lmdistill.students.regression import relative_errors


@intermediate("hidden_mse", reads="hidden", options=("relative", *OPTIONS))
class HiddenMse(torch.nn.Module):  # type: ignore[misc]
    """Squared error of hidden states, relative to the squared length of the teacher's, or a mean over the width."""

    scale: torch.Tensor  # the teacher's lengths over the student's where training starts: set before it

    def __init__(self, sides: Sides, keys: IntermediateKeys) -> None:
        super().__init__()
        self.map, self.relative = projection(sides, keys), keys.relative
        self.register_buffer("scale", torch.ones(()))

    def forward(self, student_RTD: torch.Tensor, teacher_RTD: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The sum over the positions that count."""
        mapped_RTD = self.map(student_RTD * self.scale)
        if self.relative:
            error_RT = relative_errors(mapped_RTD, teacher_RTD)
        else:
            error_RT = (mapped_RTD - teacher_RTD).pow(2).mean(-1)
        return error_RT.where(positions.counts_RT, 0.0).sum()
