"""Hidden states: the angle between the student's and the teacher's.

Axes: R rows, T positions, D width.
"""

from __future__ import annotations

import torch

from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.projection import OPTIONS, projection
from lmdistill.intermediate.registry import Positions, Sides, intermediate


@intermediate("hidden_cosine", reads="hidden", options=OPTIONS)
class HiddenCosine(torch.nn.Module):  # type: ignore[misc]
    """1 − cosine of the student's and the teacher's hidden state: blind to lengths, as the norm of a next block is."""

    def __init__(self, sides: Sides, keys: IntermediateKeys) -> None:
        super().__init__()
        self.map = projection(sides, keys)

    def forward(self, student_RTD: torch.Tensor, teacher_RTD: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The sum over the positions that count."""
        cosine_RT = torch.nn.functional.cosine_similarity(self.map(student_RTD), teacher_RTD, dim=-1)
        return (1.0 - cosine_RT).where(positions.counts_RT, 0.0).sum()
