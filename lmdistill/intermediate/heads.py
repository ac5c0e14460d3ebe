"""The intermediate losses of a run as one module: what is learned beside the student, and how it is all computed.

Axes: R rows, T positions, D width of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmdistill.intermediate.registry import Positions, Sides, Site, entry
from lmdistill.intermediate.states import TeacherStates
from lmdistill.intermediate.taps import Taps
from lmdistill.intermediate.terms import Comparison, Term


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def positions_of(inputs: dict[str, Any]) -> Positions:
    """Which positions of a batch count, and where its documents are."""
    places_RT = inputs.get("position_ids")
    return Positions(inputs["labels"] != -100, None if places_RT is None else (places_RT == 0).cumsum(1))


class IntermediateHeads(torch.nn.Module):  # type: ignore[misc]
    """Modules of all comparisons; its parameters train with the student and are dropped with it."""

    def __init__(
        self, terms: Sequence[Term], shapes: Sequence[Sequence[Sides]], taps: Taps, states: TeacherStates
    ) -> None:
        super().__init__()
        self.terms, self.taps, self.states = tuple(terms), taps, states
        self.losses = torch.nn.ModuleList(
            torch.nn.ModuleList(entry(term.keys.loss).make(sides, term.keys) for sides in of_term)
            for term, of_term in zip(terms, shapes, strict=True)
        )

    def set_steps(self) -> None:
        """Give what is learned here its own step size (read by training/optimizer.py)."""
        for term, modules in zip(self.terms, self.losses, strict=True):
            for parameter in modules.parameters():
                parameter.own_lr = term.keys.head_lr

    def sums(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Each term's sum over the positions that count, a mean over its layers; lets go of what was recorded."""
        teacher, positions = self.states.of(inputs), positions_of(inputs)
        found = {}
        for term, modules in zip(self.terms, self.losses, strict=True):
            parts = []
            for comparison, module in zip(term.comparisons, modules, strict=True):
                student_RTD = self._student(comparison, module, teacher)
                with torch.autocast(student_RTD.device.type, enabled=False):
                    parts.append(module(_wide(student_RTD), _wide(teacher[comparison.teacher]), positions))
            found[term.name] = torch.stack(parts).mean()
        self._clear()
        return found

    def calibrate(self, inputs: dict[str, Any]) -> None:
        """Set the scales of losses that have one: the median of the teacher's length over the student's."""
        teacher = self.states.of(inputs)
        for term, modules in zip(self.terms, self.losses, strict=True):
            for comparison, module in zip(term.comparisons, modules, strict=True):
                if comparison.start is not None:
                    module.input_scale.copy_(_ratio(teacher[comparison.start], self.taps.seen[comparison.student]))
                if hasattr(module, "scale"):
                    student_RTD = self._student(comparison, module, teacher)
                    module.scale.copy_(_ratio(teacher[comparison.teacher], student_RTD))
        self._clear()

    def describe(self) -> list[dict[str, Any]]:
        """For training.json: which layers were compared, and the scales that were measured."""
        found = []
        for term, modules in zip(self.terms, self.losses, strict=True):
            scales = [round(float(module.scale), 6) for module in modules if hasattr(module, "scale")]
            pairs = {"loss": term.keys.loss, "name": term.name, "pairs": [list(pair) for pair in term.pairs]}
            found.append(pairs | ({"scales": scales} if scales else {}))
        return found

    def _student(self, comparison: Comparison, module: Any, teacher: dict[Site, torch.Tensor]) -> torch.Tensor:
        """The student's side `[R, T, D]`."""
        seen = self.taps.seen[comparison.student]
        if comparison.student.kind == "block":
            begin = seen if comparison.start is None else teacher[comparison.start].to(seen.dtype) / module.input_scale
            return self.taps.rerun(comparison.student, begin.detach())
        return seen if comparison.student.kind == "hidden" else seen.flatten(2)

    def _clear(self) -> None:
        self.taps.clear()
        if self.states.taps is not None:
            self.states.taps.clear()


def _ratio(teacher_RTD: torch.Tensor, student_RTD: torch.Tensor) -> torch.Tensor:
    """The median over positions of |teacher| / |student|."""
    lengths_RT = [_wide(side).norm(dim=-1) for side in (teacher_RTD, student_RTD)]
    ratio: torch.Tensor = (lengths_RT[0] / lengths_RT[1].clamp_min(torch.finfo(torch.float32).tiny)).median()
    return ratio
