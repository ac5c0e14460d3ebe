"""Which rows of the corpus prove the teacher's engine, and how: what the teach stage opens its engine with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmdistill.corpus.format import DOC_START, CorpusReader
from lmdistill.pipeline.stage import ModelRef, StageContext
from lmdistill.teachers.engine_parity import REFERENCE, Proof
from lmdistill.teachers.low_bits import Cost
from lmdistill.teachers.registry import ENGINES

if TYPE_CHECKING:
    from lmdistill.stages.teach import TeachConfig


def record_of(ctx: StageContext[TeachConfig]) -> Path:
    """Where the figures of the engine's proof are, once it is made."""
    return ctx.work / "parity.json"


def proof_of(ctx: StageContext[TeachConfig], corpus: CorpusReader, teachers: list[ModelRef]) -> Proof | None:
    """Rows of the first split, spread over it, on which the engine must say what the reference says."""
    load_in = ctx.config.load_in
    if (ctx.config.engine == REFERENCE and load_in is None) or not ctx.config.parity_rows:
        return None
    bound = ctx.config.parity_bound
    if bound is None and ENGINES[ctx.config.engine].gguf:
        from lmdistill.teachers.llama_cpp_engine import need_gguf, parity_bound

        bound = max(parity_bound(need_gguf(teacher)) for teacher in teachers)
    split = corpus.split(ctx.config.splits[0])
    rows = np.unique(np.linspace(0, len(split) - 1, ctx.config.parity_rows).astype(int))
    tokens, flags = split.tokens_RT[rows].astype("int32"), split.flags_RT[rows]
    if load_in is not None:
        return Cost(tokens, (flags & DOC_START) != 0, None, record_of(ctx))
    return Proof(tokens, (flags & DOC_START) != 0, bound, record_of(ctx))
