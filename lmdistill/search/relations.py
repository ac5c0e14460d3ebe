"""Attention relations beside the loss at the head (AutoDistil): a candidate's last attention learns from the teacher's.

The teacher runs once a batch, for all candidates of the step. What is compared is as in lmdistill.intermediate.

Axes: R rows, T positions, D width.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from lmdistill.intermediate.heads import positions_of
from lmdistill.intermediate.registry import Site, entry
from lmdistill.intermediate.taps import Taps, attention_blocks
from lmdistill.intermediate.terms import sides

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import ModelRef
    from lmdistill.search.config import RelationKeys

PART = "relations"  # in the log


class Relations:
    """The teacher's side, and what puts the loss into a candidate's forward."""

    def __init__(self, keys: RelationKeys, teacher: ModelRef, precision: str, device: str, isolate: bool) -> None:
        from lmdistill.training.live_teacher import open_live

        self._weight = keys.weight
        self._keys = keys.as_intermediate
        self._engine = open_live(teacher, teacher.path, precision, device, isolate)
        self._sites = [Site(letter, max(attention_blocks(self._engine.model))) for letter in keys.relations]
        self._taps = Taps(self._engine.model, self._sites)
        self._of: torch.Tensor | None = None  # the batch that the taps hold

    def _teacher(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """What the teacher computes on this batch `[R, T, D]`, by letter; run if it was another batch before."""
        tokens_RT = inputs["input_ids"]
        if self._of is None or self._of is not tokens_RT:
            with self._taps.recording():
                self._engine.run(tokens_RT, inputs.get("position_ids"))
            self._of = tokens_RT
        return [self._taps.seen[site].flatten(2).float() for site in self._sites]

    def attach(self, model: Any) -> None:
        """Add the loss to a candidate's forward, which has the one at the head already."""
        last = max(attention_blocks(model))
        sites = [Site(site.kind, last) for site in self._sites]
        teacher = self._engine.model.config
        losses = [
            entry(self._keys.loss).make(sides(site, self._keys, model.config, teacher), self._keys) for site in sites
        ]
        taps, inner = Taps(model, sites), model.forward

        def forward(_: Any, **inputs: Any) -> dict[str, torch.Tensor]:
            with taps.recording():
                found: dict[str, torch.Tensor] = inner(**inputs)
            theirs, positions = self._teacher(inputs), positions_of(inputs)
            parts = []
            for site, loss, teacher_RTD in zip(sites, losses, theirs, strict=True):
                student_RTD = taps.seen[site].flatten(2).float()
                with torch.autocast(student_RTD.device.type, enabled=False):
                    parts.append(loss(student_RTD, teacher_RTD, positions))
            taps.clear()
            counted = inputs.get("num_items_in_batch")
            mean = torch.stack(parts).mean() / (positions.counts_RT.sum() if counted is None else counted)
            return {**found, PART: mean, "loss": found["loss"] + self._weight * mean}

        model.forward = types.MethodType(forward, model)
