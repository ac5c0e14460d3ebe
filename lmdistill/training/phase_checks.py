"""What can be known before it runs of how a distillation changes in its course, and of what it weighs."""

from __future__ import annotations

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.losses import registry
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.training.config import DistillConfig
from lmdistill.training.schedules import find_shape

NO_MIX = ("ce", "none")  # losses without a weight λ


def check_phases(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """Shapes that are not there, and schedules of what the chosen loss does not read."""
    return _shapes(ctx) + _unread_schedules(ctx)


def _shapes(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    problems: list[LmdistillError] = []
    for change in (ctx.config.kd_weight_schedule, ctx.config.temperature_schedule):
        try:
            find_shape(change.shape if change else "constant")
        except LmdistillError as error:
            problems.append(PreflightError(f"stage '{ctx.name}': {error.what}", fix=error.fix))
    return problems


def _unread_schedules(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    config, known = ctx.config, registry.catalogue()
    if config.loss not in known:  # said already
        return []
    unread = []
    if config.temperature_schedule is not None and "temperature" not in known[config.loss].options:
        unread.append(("temperature_schedule", [name for name in known if "temperature" in known[name].options]))
    if config.kd_weight_schedule is not None and config.loss in NO_MIX:
        unread.append(("kd_weight_schedule", [name for name in known if name not in NO_MIX]))
    return [
        PreflightError(
            f"stage '{ctx.name}': the loss '{config.loss}' does not read `{key}`",
            fix=f"drop `{key}`, or choose a loss that reads it: {', '.join(names)}",
        )
        for key, names in unread
    ]
