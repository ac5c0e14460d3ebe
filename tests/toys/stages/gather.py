"""A toy stage with every sort of key: writes a text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import Estimate, PreflightContext, RuntimeKey, Stage, StageConfig, StageContext


class Part(BaseModel):
    """A nested model with a runtime key of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, description="how much of it")
    batch: Annotated[int, RuntimeKey()] = Field(default=8, description="how many at a time")


class GatherConfig(StageConfig):
    """Keys of the toy stage."""

    text: str = Field(default="abc", description="what to write")
    repeat: int = Field(default=1, ge=1, description="how often")
    mode: Literal["upper", "lower"] = Field(default="lower", description="letters")
    parts: list[Part] = Field(default_factory=lambda: [Part()], description="parts")
    data: AssetSpec | None = Field(default=None, description="a file to add")
    workers: Annotated[int | None, RuntimeKey()] = Field(default=None, description="how fast")
    disk: Annotated[int, RuntimeKey()] = Field(default=1000, description="bytes it claims to need on disk")
    memory: Annotated[int, RuntimeKey()] | None = Field(default=None, description="bytes of memory it claims to need")
    measured: Annotated[str, RuntimeKey()] = Field(default="", description="what it finds when it measures")
    complain: Annotated[bool, RuntimeKey()] = Field(default=False, description="object in the preflight")


class Gather(Stage[GatherConfig]):
    """Write a text."""

    name, version, output, Config = "gather", 1, "corpus", GatherConfig
    tools = ("pydantic",)

    def preflight(self, ctx: PreflightContext[GatherConfig]) -> list[LmdistillError]:
        return [PreflightError(f"'{ctx.name}' objects", fix="stop it")] if ctx.config.complain else []

    def estimate(self, ctx: PreflightContext[GatherConfig]) -> Estimate:
        return Estimate(2.0, ctx.config.disk, ctx.config.memory, "a toy")

    def run(self, ctx: StageContext[GatherConfig]) -> dict[str, Any]:
        from lmdistill import assets

        text = ctx.config.text * ctx.config.repeat
        if ctx.config.data:
            path = assets.available(ctx.config.data)
            assert path is not None
            text += path.read_text()
        text = text.upper() if ctx.config.mode == "upper" else text
        (ctx.out / "text.txt").write_text(text + ctx.config.measured)
        ctx.progress.update(1, 1, "texts", loss=0.5)
        ctx.progress.note("gathered")
        print("printed by the stage")
        return {"tokens": len(text)}
