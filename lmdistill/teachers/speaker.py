"""Who a cache is taken from: the recipe's teacher, or the model that an earlier stage has made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmdistill.pipeline.stage import Artefact, ModelRef, PreflightContext, StageContext

ROLE = "speaker"  # of the model, among the inputs of `teach`


def speaker(ctx: StageContext[Any]) -> ModelRef:
    """The model that plays the role, else the recipe's teacher; LmdistillError where there is neither."""
    models = ctx.inputs.get(ROLE)
    return _nameless(models[0]) if models else ctx.need_teacher()


def planned_speaker(ctx: PreflightContext[Any]) -> ModelRef | None:
    """The same as far as it is on this machine; None where it is still to be made or fetched."""
    planned = ctx.inputs.get(ROLE)
    if not planned:
        return ctx.teacher
    return _nameless(planned[0].artefact) if planned[0].artefact else None


def _nameless(artefact: Artefact) -> ModelRef:
    """The artefact's model; stages' names stay out of the cache, so that a stage of another name makes the same."""
    return replace(artefact.model(), source=f"model {artefact.fingerprint[:12]}")
