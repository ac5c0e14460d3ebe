"""What can be known before it runs of how a distillation changes in its course, and of what it weighs."""

from __future__ import annotations

from lmdistill.curriculum.difficulty import find_measure
from lmdistill.curriculum.pacing import open_share
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.losses import registry
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.training.config import DistillConfig
from lmdistill.training.ground_truth import HELD_OUT
from lmdistill.training.schedules import find_shape
from lmdistill.training.token_weights import find_weighting

NO_MIX = ("ce", "none")  # losses without a weight λ


def check_phases(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """Names that are not there, schedules of what the chosen loss does not read, curricula without what they need."""
    return _shapes(ctx) + _unread_schedules(ctx) + _curriculum(ctx) + _token_weights(ctx) + _auto(ctx)


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


def _curriculum(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    curriculum = ctx.config.curriculum
    if curriculum is None:
        return []
    problems: list[LmdistillError] = []
    for find in (lambda: find_measure(curriculum.difficulty), lambda: open_share(curriculum, 0.0)):
        try:
            find()
        except LmdistillError as error:
            problems.append(PreflightError(f"stage '{ctx.name}': {error.what}", fix=error.fix))
    rows = ctx.inputs.get("signals", ())
    if not curriculum.graded and any(planned.kind == "corpus" for planned in rows):
        problems.append(_no_cache(ctx, f"the difficulty '{curriculum.difficulty}' reads", "curriculum"))
    return problems + _ungraded(ctx)


def _no_cache(ctx: PreflightContext[DistillConfig], what: str, key: str) -> PreflightError:
    return PreflightError(
        f"stage '{ctx.name}': {what} a teacher cache, and it has none",
        why=f"its rows are those of the corpus '{ctx.one('signals').name}', on which no teacher has spoken yet",
        fix=f"put a `teach` stage before it, or drop `{key}`",
    )


def _token_weights(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    config, keys = ctx.config, ctx.config.token_weights
    if keys is None:
        return []
    try:
        find_weighting(keys)
    except LmdistillError as error:
        return [PreflightError(f"stage '{ctx.name}': {error.what}", fix=error.fix)]
    if config.loss == "none" or (config.loss == "ce" and keys.of == "kd"):
        what = f"stage '{ctx.name}': with `loss: {config.loss}` there is nothing that `token_weights` could weigh"
        return [PreflightError(what, fix="drop `token_weights`, or choose another loss")]
    if any(planned.kind == "corpus" for planned in ctx.inputs.get("signals", ())):
        return [_no_cache(ctx, "`token_weights` read", "token_weights")]
    return []


def _auto(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """What an estimate of λ needs: a mix to weigh, and held-out rows that the teacher has spoken on."""
    config, stage = ctx.config, f"stage '{ctx.name}': `kd_weight: auto`"
    if config.kd_weight != "auto":
        return []
    if config.loss in NO_MIX:
        return [PreflightError(f"{stage} is not read by the loss '{config.loss}'", fix="drop `kd_weight`")]
    if config.mix != "convex":
        why = "it estimates the text's share of one target, and an additive mix has no shares"
        return [PreflightError(f"{stage} does not go with `mix: {config.mix}`", why=why, fix="set `mix: convex`")]
    rows = ctx.inputs.get("signals", ())
    if any(planned.kind == "corpus" for planned in rows):
        return [_no_cache(ctx, "`kd_weight: auto` reads", "kd_weight")]
    if all(HELD_OUT in getattr(planned.config, "splits", (HELD_OUT,)) for planned in rows):
        return []
    return [
        PreflightError(
            f"{stage} is estimated on held-out rows, which the teacher cache will not have",
            fix=f"add '{HELD_OUT}' to the teach stage's `splits`",
        )
    ]


def _ungraded(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """The corpus will have the success rates that a curriculum reads."""
    if ctx.config.curriculum is None or not ctx.config.curriculum.graded:
        return []
    planned = ctx.inputs.get("corpus", ())
    sources = [source for corpus in planned for source in getattr(corpus.config, "sources", ())]
    if all(source.success is not None for source in sources) and sources:
        return []
    return [
        PreflightError(
            f"stage '{ctx.name}': the difficulty 'success_rate' needs success rates, and the corpus will have none",
            why="not every source names a field with them",
            fix="set `success:` in every source of the corpus, or choose another `difficulty`",
        )
    ]
