"""The keys of a student that learns through a low-rank adapter (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the head


class LoraKeys(BaseModel):
    """`lora:` of `distill`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Annotated[int, Field(ge=1)] = Field(default=16, description="r, the adapter's rank")
    alpha: Annotated[float, Field(gt=0)] = Field(default=32.0, description="the adapter counts alpha / rank times")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the adapter's inputs that a step leaves out"
    )
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=(ALL_LINEAR,), description="ends of the names of adapted layers; all-linear: all but the head"
    )
    base_teaches: bool = Field(
        default=False, description="the student without its adapter is the live teacher: one set of weights in memory"
    )
