"""The linear map that takes a student's states into the teacher's width; trained with the student, dropped with it.

Axes: Ds the student's width, Dt the teacher's.
"""

from __future__ import annotations

import torch

from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.registry import Sides

OPTIONS = ("projection", "head_lr")  # the keys that a loss with such a map reads


def projection(sides: Sides, keys: IntermediateKeys) -> torch.nn.Module:
    """A map Ds → Dt without bias that starts orthogonal; the identity where widths are equal and none is asked for."""
    if sides.student == sides.teacher and not keys.projection:
        return torch.nn.Identity()
    linear = torch.nn.Linear(sides.student, sides.teacher, bias=False)
    torch.nn.init.orthogonal_(linear.weight)
    return linear
