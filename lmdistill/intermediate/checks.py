"""What can be known of intermediate losses before a run: names, keys, layers, the cache, relation heads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.intermediate import layer_maps
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.layer_maps import Depths
from lmdistill.intermediate.registry import catalogue, entry
from lmdistill.intermediate.states import check_cached
from lmdistill.intermediate.terms import sides, term
from lmdistill.pipeline.stage import Planned, PreflightContext
from lmdistill.signals.hidden_plan import shape_of

if TYPE_CHECKING:
    from lmdistill.training.config import DistillConfig

Shape = dict[str, Any] | None  # of a config.json; None: not known yet


def check_intermediate(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """One error for each entry that cannot work, as far as student, teacher and cache are known."""
    errors: list[LmdistillError] = []
    if ctx.config.loss == "none" and not ctx.config.intermediate:
        what = f"stage '{ctx.name}': with `loss: none` and no `intermediate` there is nothing to learn from"
        errors.append(PreflightError(what, fix="add an entry to `intermediate`, or choose a loss at the head"))
    for keys in ctx.config.intermediate:
        try:
            _check_keys(keys)
            _check_layers(ctx, keys)
        except LmdistillError as error:
            errors.append(type(error)(f"stage '{ctx.name}': {error.what}", why=error.why, fix=error.fix))
    return errors


def _check_keys(keys: IntermediateKeys) -> None:
    """Raise PreflightError for an unknown loss, or a key that the chosen one does not read."""
    for option in entry(keys.loss).unread(keys):
        raise PreflightError(
            f"the intermediate loss '{keys.loss}' does not read `{option}`",
            why=f"it reads {', '.join(entry(keys.loss).options) or 'no key of its own'}",
            fix=f"drop `{option}`, or choose a loss that reads it: "
            + ", ".join(name for name, one in catalogue().items() if option in one.options),
        )


def _check_layers(ctx: PreflightContext[DistillConfig], keys: IntermediateKeys) -> None:
    """Raise PreflightError where layers are out of range or not in the cache, or heads do not divide."""
    reads, student = entry(keys.loss).reads, _student(ctx)
    teacher = student if ctx.config.self_teacher else _teacher(ctx)
    if keys.layers == "grown":
        if not all(_records_growth(planned) for planned in ctx.inputs.get("student", ())):
            layer_maps.pairs(keys, reads, Depths(1, None))
        return
    if teacher is None or student is None:
        return
    depths = Depths(student["num_hidden_layers"], teacher["num_hidden_layers"], _attention(ctx, student))
    planned = term(keys.loss, keys, reads, layer_maps.pairs(keys, reads, depths))
    for comparison in planned.comparisons:
        sides(comparison.student, keys, SimpleNamespace(**student), SimpleNamespace(**teacher))
    for cache in ctx.inputs.get("signals", ()):
        held = _held(cache, teacher)
        if held is not None and not keys.runs_teacher:
            check_cached([site.layer for site in planned.sites], held, keys.loss)


def _teacher(ctx: PreflightContext[DistillConfig]) -> Shape:
    if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
        return None
    shape_of(ctx.teacher.path)
    config: dict[str, Any] = json.loads((ctx.teacher.path / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = config.get("text_config", config)
    return found


def _student(ctx: PreflightContext[DistillConfig]) -> Shape:
    """Its config.json where it is made already, else what its stage's keys and the teacher say."""
    from lmdistill.deployment.planned import planned_config
    from lmdistill.quantization.planned import folder_ahead

    for planned in ctx.inputs.get("student", ()):
        if (folder := folder_ahead(planned)) is not None:
            made: dict[str, Any] = json.loads((folder / "config.json").read_text())
            return made
    stage, teacher = ctx.ancestor("student"), _teacher(ctx)
    return None if stage is None or teacher is None else planned_config(stage.config.model_dump(), teacher)


def _attention(ctx: PreflightContext[DistillConfig], student: dict[str, Any]) -> tuple[int, ...] | None:
    """The student's blocks that attend; None before it is made, where only their number is known."""
    if not all(planned.artefact for planned in ctx.inputs.get("student", ())) or "layer_types" not in student:
        return None
    return tuple(place for place, kind in enumerate(student["layer_types"], 1) if kind == "full_attention")


def _records_growth(student: Planned) -> bool:
    """Whether the student says, or will say, how it was grown."""
    if student.artefact is not None:
        return bool(layer_maps.recorded_plan(student.artefact.out / "model"))
    if student.stage == "search":
        return True
    if student.stage == "student":
        return bool(getattr(student.config, "init", "") == "grow")
    handed_on = bool(getattr(student.config, "intermediate", ()))
    return handed_on and all(_records_growth(above) for above in student.inputs.get("student", ()))


def _held(cache: Planned, teacher: dict[str, Any]) -> list[int] | None:
    """The layers whose hidden states the cache will hold; None where its stage does not say."""
    layers = getattr(cache.config, "hidden_layers", None)
    return None if layers is None else [layer % (teacher["num_hidden_layers"] + 1) for layer in layers]
