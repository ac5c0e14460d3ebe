"""The keys of the `search` stage that say what may be proposed, for which device, and within which budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lmdistill.deployment.formats import known_format
from lmdistill.errors import nearest
from lmdistill.pipeline.stage import StageConfig
from lmdistill.quantization.plan import PRESETS
from lmdistill.search.budget import Budget, BudgetText, parse
from lmdistill.search.profile import TimingPlan
from lmdistill.search.space import SpaceConfig


def _timed(name: str) -> str:
    lower = known_format(name)
    if lower not in PRESETS:
        raise ValueError(f"candidates cannot be timed in {lower}; in {', '.join(PRESETS)}{nearest(lower, PRESETS)}")
    return lower


class TimingConfig(BaseModel):
    """How candidates are timed, so that the others' speed can be foretold."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    format: Annotated[str, AfterValidator(_timed)] = Field(
        default=TimingPlan.format, description="the GGUF format that will ship, by llama.cpp's name"
    )
    candidates: Annotated[int, Field(ge=12)] = Field(
        default=30, description="shapes that are timed to fit the latency model"
    )
    prompts: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)] = Field(
        default=TimingPlan.prompts, description="tokens of the prompts whose first answer is timed"
    )
    decode: Annotated[int, Field(ge=4)] = Field(
        default=TimingPlan.decode, description="tokens of a burst of generation"
    )
    bursts: Annotated[int, Field(ge=1)] = Field(
        default=TimingPlan.bursts, description="bursts of generation of each file in a round"
    )
    rounds: Annotated[int, Field(ge=1)] = Field(
        default=TimingPlan.rounds, description="rounds in which the files take turns"
    )
    together: Annotated[int, Field(ge=1)] = Field(
        default=TimingPlan.together, description="files in memory at once beside the reference"
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        default=TimingPlan.threads, description="null: the physical cores"
    )

    @property
    def plan(self) -> TimingPlan:
        """What a device is told of it."""
        prompts = tuple(sorted(set(self.prompts)))
        return TimingPlan(self.format, prompts, self.decode, self.rounds, self.together, self.threads, self.bursts)


class DeviceSearchConfig(StageConfig):
    """Which students may be proposed, for which device, within which budgets."""

    space: SpaceConfig = Field(default=SpaceConfig(), description="the students that may be proposed")
    device: Literal["local"] | Path = Field(
        default="local", description="local: this machine; else the path of a profile that another one sent"
    )
    timing: TimingConfig = Field(default=TimingConfig(), description="how candidates are timed")
    budgets: tuple[BudgetText, ...] = Field(
        default=(), description="what a student must keep: decode_tps >= 50, ttft_ms <= 400, decode >= 2.0x teacher"
    )

    @property
    def bounds(self) -> tuple[Budget, ...]:
        """The budgets, read."""
        return tuple(parse(text) for text in self.budgets)

    @model_validator(mode="after")
    def _timed_prompts(self) -> DeviceSearchConfig:
        for budget in self.bounds:
            if budget.prompt is not None and budget.prompt not in self.timing.prompts:
                raise ValueError(f"'{budget}': add {budget.prompt} to timing.prompts, so that it is timed")
        return self
