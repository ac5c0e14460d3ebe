"""A toy stage that works step by step and resumes; it can fail in many ways."""

from __future__ import annotations

import os
import signal
import time
from typing import Annotated, Any, Literal

from pydantic import Field

from lmdistill.errors import AssetError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import Input, RuntimeKey, Stage, StageConfig, StageContext


class LearnConfig(StageConfig):
    """Keys of the toy stage."""

    steps: int = Field(default=3, ge=1, description="files to write")
    with_teacher: bool = Field(default=False, description="read the teacher")
    pause: Annotated[float, RuntimeKey()] = Field(default=0.0, description="seconds a step")
    fail: Annotated[Literal["", "value", "own", "kill", "exit", "memory", "verify", "nan"], RuntimeKey()] = Field(
        default="", description="how to fail"
    )


class Learn(Stage[LearnConfig]):
    """Write one file a step."""

    name, version, output, Config = "learn", 1, "model", LearnConfig
    inputs = (Input("corpus", ("corpus",)), Input("start", ("model",), optional=True))

    def uses_teacher(self, config: LearnConfig) -> bool:
        return config.with_teacher

    def run(self, ctx: StageContext[LearnConfig]) -> dict[str, Any]:
        text = (ctx.one("corpus").out / "text.txt").read_text()
        (ctx.out / "model").mkdir(exist_ok=True)
        for step in range(ctx.config.steps):
            target = ctx.out / "model" / f"{step}.txt"
            if not target.exists():
                time.sleep(ctx.config.pause)
                write_text(target, f"{step} {text}")
            ctx.progress.update(step + 1, ctx.config.steps, "steps")
            if step == ctx.config.steps // 2:
                self._fail(ctx.config.fail)
        if ctx.config.with_teacher:
            config = (ctx.need_teacher().path / "config.json").read_text()
            write_text(ctx.out / "teacher.txt", config)
        return {"tokens": len(text) * ctx.config.steps, "loss": float("nan") if ctx.config.fail == "nan" else 0.5}

    def _fail(self, how: str) -> None:
        if how == "value":
            raise ValueError("no such luck")
        if how == "own":
            raise AssetError("the moon is missing", why="it set", fix="wait for the night")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        if how == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def verify(self, ctx: StageContext[LearnConfig], metrics: dict[str, Any]) -> None:
        if ctx.config.fail == "verify":
            raise ValueError("the files do not add up")
