"""Opens a teacher engine where it will run: in this process or on another machine, which is sent a call of this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmdistill.pipeline.stage import ModelRef, Runtime
from lmdistill.teachers.engine import EngineOptions, TeacherEngine
from lmdistill.teachers.ensemble import EnsembleEngine
from lmdistill.teachers.registry import create_engine


def open_engine(
    name: str,
    teacher: ModelRef,
    options: EngineOptions,
    others: Sequence[ModelRef] = (),
    weights: Sequence[float] = (),
) -> TeacherEngine:
    """The engine `name`, opened on `teacher`, or on it and `others` to score with the weighted mean of them all.

    The device `auto` is a GPU where this machine has one.
    """
    engine = EnsembleEngine(name, others, weights) if others else create_engine(name)
    engine.open(teacher, replace(options, device=Runtime(options.device).resolve_device()))
    return engine
