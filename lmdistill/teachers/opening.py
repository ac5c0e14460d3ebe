"""Opens a teacher engine where it will run: in this process or on another machine, which is sent a call of this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmdistill.pipeline.stage import ModelRef, Runtime
from lmdistill.teachers.engine import EngineOptions, TeacherEngine
from lmdistill.teachers.engine_parity import REFERENCE, Proof
from lmdistill.teachers.ensemble import EnsembleEngine
from lmdistill.teachers.registry import create_engine


def open_engine(
    name: str,
    teacher: ModelRef,
    options: EngineOptions,
    others: Sequence[ModelRef] = (),
    weights: Sequence[float] = (),
    proof: Proof | None = None,
) -> TeacherEngine:
    """The engine `name`, opened on `teacher`, or on it and `others` to score with the weighted mean of them all.

    The device `auto` is a GPU where this machine has one. With `proof` the engine must say what the reference says,
    which speaks first and is dropped: the two are never in memory together. Raises IntegrityError where it does not.
    """
    options = replace(options, device=Runtime(options.device).resolve_device())
    expected = None if proof is None else proof.expect(teacher, options, lambda: _made(REFERENCE, others, weights))
    engine = _made(name, others, weights)
    engine.open(teacher, options)
    if proof is not None and expected is not None:
        proof.settle(engine, expected)
    return engine


def _made(name: str, others: Sequence[ModelRef], weights: Sequence[float]) -> TeacherEngine:
    return EnsembleEngine(name, others, weights) if others else create_engine(name)
