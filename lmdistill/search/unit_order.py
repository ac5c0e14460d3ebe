"""Puts a student's channels and heads back where the teacher has them, where it keeps all of them.

A super-network has its units in their order of importance, so that narrower candidates take the first of each. A
student that keeps every channel of the residual stream, or every head, is given them in the teacher's order: losses
between layers of the two compare channel with channel and head with head. What it computes stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lmdistill.search.candidate import Candidate
from lmdistill.search.slicing import Full, Part, axes_of, parts_of, take

RESTORED = ("D", "Q", "K")  # axes that losses between layers see (see slicing.py); of others only the order differs


@dataclass(frozen=True)
class UnitOrder:
    """Where each unit of a super-network was in the teacher, by axis; of heads block by block."""

    everywhere: Mapping[str, torch.Tensor]
    by_block: tuple[Mapping[str, torch.Tensor], ...]

    def back(self, candidate: Candidate, full: Full, name: str) -> dict[str, Part]:
        """How the axes of a candidate's tensor go back; nothing of an axis that it has a part of only."""
        whole = {axis for axis, part in parts_of(candidate, full).items() if part is None and axis in RESTORED}
        if not {"Q", "K"} <= whole:  # queries go with their key heads
            whole -= {"Q", "K"}
        order = dict(self.everywhere)
        if name.startswith("model.layers."):
            order |= self.by_block[candidate.layers[int(name.split(".")[2])].source]
        return {axis: torch.argsort(order[axis]) for axis in whole if axis in order}


def restore(model: Any, candidate: Candidate, full: Full, order: UnitOrder) -> None:
    """Put a candidate's model back in the teacher's order, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(take(parameter, axes_of(name), order.back(candidate, full, name)))
