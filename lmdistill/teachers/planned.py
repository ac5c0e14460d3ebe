"""What a recipe asks of its teachers, held against those that are on this machine, and what they will cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import ModelRef, PreflightContext
from lmdistill.precision import products_in
from lmdistill.signals.format import TeacherInfo
from lmdistill.signals.hidden import HiddenLayout
from lmdistill.signals.hidden_plan import check_hidden, hidden_layout, hidden_memory
from lmdistill.teachers.ensemble import check_ensemble
from lmdistill.teachers.ensemble_members import check_members, ensemble_info, members_here
from lmdistill.teachers.registry import ENGINES
from lmdistill.teachers.sampling_keys import SAMPLED, draw_keys

if TYPE_CHECKING:
    from lmdistill.signals.format import Layout
    from lmdistill.stages.teach import TeachConfig

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes a parameter
BASE_MEMORY = 1_000_000_000  # torch, one batch of hidden states, a chunk of logits, what waits for the disk


def precision_of(config: TeachConfig, teacher: ModelRef) -> str:
    """The precision that the manifest names; PreflightError where the engine cannot have the one that is asked."""
    if not ENGINES[config.engine].gguf:
        return f"{config.precision}, {config.load_in}" if config.load_in else config.precision
    from lmdistill.teachers.llama_cpp_engine import need_gguf, weight_type

    if config.precision != "float32":
        raise PreflightError(
            f"engine '{config.engine}' cannot score in {config.precision}",
            why="the weights are as precise as the GGUF file, the rest is float32",
            fix="drop `precision`; a GGUF of another file type is another teacher",
        )
    return weight_type(need_gguf(teacher))


def who_speaks(config: TeachConfig, teachers: Sequence[ModelRef], version: str) -> TeacherInfo:
    """For the manifest: the recipe's teacher, or the ensemble that it leads; `version` is the engine's."""
    if len(teachers) > 1:
        return ensemble_info(
            teachers, config.ensemble_weights, lambda model: precision_of(config, model), config.engine, version
        )
    [teacher] = teachers
    return TeacherInfo(teacher.lasting_source, teacher.digest, precision_of(config, teacher), config.engine, version)


def check_planned_ensemble(ctx: PreflightContext[TeachConfig]) -> None:
    """Engine, token maps and precision of the teachers beside the recipe's, as far as they are here."""
    if not ctx.config.ensemble or ctx.config.engine not in ENGINES:
        return
    check_ensemble(ctx.config.engine)
    others = members_here(ctx.config.ensemble)
    for other in others:
        precision_of(ctx.config, other)
    if ctx.teacher is not None:
        check_members(ctx.teacher, others)


def check_planned_hidden(ctx: PreflightContext[TeachConfig]) -> None:
    """Whether the engine can give the hidden states that are asked for, and the teacher has them."""
    if ctx.config.hidden_layers and ctx.config.engine in ENGINES:
        check_hidden(ctx.config.engine, 1 + len(ctx.config.ensemble))
        if ctx.teacher is not None:
            hidden_of(ctx.config, ctx.teacher)


def check_planned_bits(ctx: PreflightContext[TeachConfig]) -> None:
    """Whether the teacher can be loaded in as few bits as are asked for, on the device that it will run on."""
    if ctx.config.load_in:
        from lmdistill.teachers.low_bits import check_low_bits

        check_low_bits(ctx.config.load_in, ctx.config.engine, ctx.runtime.resolve_device())


def hidden_of(config: TeachConfig, teacher: ModelRef) -> HiddenLayout | None:
    """The hidden states that will be stored; None where none are asked for."""
    return hidden_layout(config.hidden_layers, config.hidden_dtype, teacher.path)


def layout_of(config: TeachConfig, row_tokens: int, vocab_size: int, teacher: ModelRef | None) -> Layout:
    """What the configuration makes of rows of `row_tokens` tokens; no hidden states where the teacher is not known."""
    from lmdistill.signals.format import Layout
    from lmdistill.signals.sampling import Sampling

    if config.variant == SAMPLED:
        sampling = Sampling(*draw_keys(config))
        return Layout(row_tokens, sampling.draws, vocab_size, config.variant, sampling=sampling)
    k_min = config.k_min if config.top_p is not None else None
    hidden = None if teacher is None else hidden_of(config, teacher)
    return Layout(row_tokens, config.k, vocab_size, config.variant, top_p=config.top_p, k_min=k_min, hidden=hidden)


def note_without_teacher(config: TeachConfig, tokens: int) -> str:
    """What is known of a cache's size before its teacher is: ids are taken for 16 bits wide."""
    from lmdistill.pipeline.display import size
    from lmdistill.signals import variant as variants

    layout = layout_of(config, 1, 65_536, None)
    disk = size(tokens * variants.get(layout.variant).bytes_bound(layout))
    return f"about {disk} of disk for {tokens:,} tokens at a vocabulary of 65,536 or less; time: known with the teacher"


def planned_load(ctx: PreflightContext[TeachConfig], teacher: ModelRef) -> tuple[int, int]:
    """(parameters that every token goes through, bytes of memory), of all teachers that are here."""
    teachers = [teacher, *members_here(ctx.config.ensemble)]
    parameters = sum(parameters_of(model.path) for model in teachers)
    device = ctx.runtime.resolve_device()
    weights = sum(_weight_bytes(ctx.config, model, device) for model in teachers)
    if ctx.config.engine != "transformers" and ctx.config.parity_rows:
        weights = max(weights, parameters * WIDTHS["float32"])  # the reference of the proof
    return parameters, weights + BASE_MEMORY + _hidden_memory(ctx, teacher)


def _hidden_memory(ctx: PreflightContext[TeachConfig], teacher: ModelRef) -> int:
    """Bytes of hidden states held at once; 0 where none are kept, or the rows' length is not known yet."""
    layout = hidden_of(ctx.config, teacher)
    length = getattr(ctx.one("corpus").config, "sequence_length", None)
    if layout is None or length is None:
        return 0
    return hidden_memory(layout, teacher.path, ctx.config.batch_rows * int(length))


def _weight_bytes(config: TeachConfig, model: ModelRef, device: str) -> int:
    """Memory of a teacher's weights: those of its GGUF where that is what is scored."""
    if config.engine in ENGINES and ENGINES[config.engine].gguf and model.gguf is not None:
        return model.gguf.stat().st_size
    held = WIDTHS[products_in(config.precision, device)]
    if config.load_in:
        from lmdistill.teachers.low_bits import BYTES

        whole = held if config.parity_rows else 0  # loaded once, to measure what is lost
        return int(parameters_of(model.path) * max(whole, BYTES[config.load_in]))
    return parameters_of(model.path) * held


def parameters_of(folder: Path) -> int:
    """Parameters of a checkpoint, from the headers of its safetensors files."""
    from lmdistill.checkpoints import stored_tensors

    return sum(math.prod(shape) for _, shape in stored_tensors(folder))
