"""Puts intermediate losses into the student's forward, beside the loss at the head, and takes them out again."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmdistill.intermediate import layer_maps
from lmdistill.intermediate.heads import IntermediateHeads
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.layer_maps import Depths
from lmdistill.intermediate.registry import entry
from lmdistill.intermediate.states import HiddenCollator, TeacherStates, cached_layers, check_cached
from lmdistill.intermediate.taps import Taps, attention_blocks, decoder_blocks
from lmdistill.intermediate.terms import Term, sides, term
from lmdistill.pipeline.stage import ModelRef
from lmdistill.signals.hidden_plan import shape_of
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.data import SignalsCollator

if TYPE_CHECKING:
    from lmdistill.training.live_teacher import LiveEngine

HEADS = "intermediate_heads"  # the submodule of a student with what is learned beside it
CALIBRATION_ROWS = 2  # rows on which the scale of the student's states is measured


@dataclass(frozen=True)
class Sources:
    """What intermediate losses learn from."""

    reader: SignalsReader | CorpusRows
    student: Path  # its model folder: how it was grown is recorded beside it
    engine: LiveEngine | None  # a teacher that runs beside the student
    teacher: ModelRef | None  # the recipe's teacher, where there is one
    own: bool = False  # the engine runs the student itself as it was: states are of one scale

    @property
    def teacher_blocks(self) -> int | None:
        """The depth of the teacher that is learned from; None where nothing here says it."""
        if self.engine is not None:
            return len(decoder_blocks(self.engine.model))
        if self.teacher is None or isinstance(self.reader, CorpusRows):
            return None
        return shape_of(self.teacher.path)[0] if self.teacher.digest == self.reader.manifest.teacher.digest else None


def attach(
    student: Any, entries: Sequence[IntermediateKeys], sources: Sources, first: Sequence[int], seed: int, head: bool
) -> SignalsCollator:
    """Add the losses to the student's forward; the collator that brings what they learn from.

    `first` are the rows training begins with; without `head` there is no loss at the head, and none of its cost.
    Raises PreflightError where a layer is not there, on either side.
    """
    terms = _terms(student, entries, sources)
    cached = sorted({site.layer for one in terms if not one.keys.runs_teacher for site in one.sites})
    live = [site for one in terms if one.keys.runs_teacher for site in one.sites]
    states = TeacherStates(cached, sources.engine, live)
    taps = Taps(student, [comparison.student for one in terms for comparison in one.comparisons])
    device = next(student.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = IntermediateHeads(terms, [_shapes(one, student, sources) for one in terms], taps, states).to(device)
    heads.set_steps()
    isolate = sources.reader.manifest.packing == "isolate"
    collator = SignalsCollator(sources.reader, isolate)
    if cached and isinstance(sources.reader, SignalsReader):
        collator = HiddenCollator(sources.reader, isolate, cached)
    if not sources.own:
        _calibrate(student, heads, {name: one.to(device) for name, one in collator(first[:CALIBRATION_ROWS]).items()})
    student.add_module(HEADS, heads)
    student.forward = types.MethodType(_forward(student.forward if head else _body(student)), student)
    return collator


def detach(student: Any) -> list[dict[str, Any]]:
    """Take out what `attach` put in, but for the forward; what was compared, or an empty list where nothing was."""
    heads = getattr(student, HEADS, None)
    if heads is None:
        return []
    described: list[dict[str, Any]] = heads.describe()
    heads.taps.remove()
    delattr(student, HEADS)
    return described


def recorded(compared: list[dict[str, Any]], student: Path) -> dict[str, Any]:
    """What training.json says of it: layers and scales, and how the student was grown, for the next `layers: grown`."""
    plan = layer_maps.recorded_plan(student)
    return ({"intermediate": compared} | ({"plan": list(plan)} if plan else {})) if compared else {}


def _terms(student: Any, entries: Sequence[IntermediateKeys], sources: Sources) -> list[Term]:
    plan = layer_maps.recorded_plan(sources.student)
    blocks = sources.teacher_blocks or len(plan) or None
    depths = Depths(len(decoder_blocks(student)), blocks, attention_blocks(student), plan)
    found: list[Term] = []
    for keys in entries:
        reads = entry(keys.loss).reads
        count = sum(one.keys.loss == keys.loss for one in found)
        made = term(
            f"{keys.loss}_{count + 1}" if count else keys.loss, keys, reads, layer_maps.pairs(keys, reads, depths)
        )
        if not keys.runs_teacher:
            held = cached_layers(sources.reader)
            there = [pair for pair in made.pairs if pair[1] in held]
            if keys.layers == "grown" and there:
                made = term(made.name, keys, reads, there)
            check_cached([site.layer for site in made.sites], held, keys.loss)
        found.append(made)
    return found


def _shapes(one: Term, student: Any, sources: Sources) -> list[Any]:
    engine, reader = sources.engine, sources.reader
    if one.keys.runs_teacher or isinstance(reader, CorpusRows) or reader.manifest.layout.hidden is None:
        width, teacher = None, None if engine is None else engine.model.config
    else:
        width, teacher = reader.manifest.layout.hidden.width, None
    return [sides(comparison.student, one.keys, student.config, teacher, width) for comparison in one.comparisons]


def _calibrate(student: Any, heads: IntermediateHeads, inputs: dict[str, Any]) -> None:
    """Measure scales on a batch, in the student's own precision and without compiling it."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), heads.taps.recording():
        student.model(input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids"), use_cache=False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        heads.calibrate(inputs)


def _body(student: Any) -> Callable[..., dict[str, torch.Tensor]]:
    """A forward through the blocks alone, with no loss yet."""

    def run(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any) -> dict[str, torch.Tensor]:
        student.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return {"loss": torch.zeros((), device=input_ids.device)}

    return run


def _forward(inner: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """`inner` with the intermediate losses added to its loss, and each of them, a mean over positions, to its parts."""

    def forward(self: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        heads: IntermediateHeads = getattr(self, HEADS)
        with ExitStack() as recording:
            recording.enter_context(heads.taps.recording())
            if heads.states.taps is not None:
                recording.enter_context(heads.states.taps.recording())
            found = inner(**inputs)
        sums = heads.sums(inputs)
        counted = inputs.get("num_items_in_batch")
        count = (inputs["labels"] != -100).sum() if counted is None else counted
        means = {name: total / count for name, total in sums.items()}
        weighted = [one.keys.weight * means[one.name] for one in heads.terms]
        return {**found, **means, "loss": found["loss"] + torch.stack(weighted).sum()}

    return forward
