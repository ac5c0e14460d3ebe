"""What a recipe is: its own keys, and a stage's entry once it has been checked and wired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lmdistill.asset_spec import AssetSpec
from lmdistill.pipeline.launch_keys import LaunchSection
from lmdistill.pipeline.stage import Runtime, Stage, StageConfig

TEACHER = "teacher"  # the reserved name of the recipe's teacher in `from:`
NAME_PATTERN = r"^[a-z0-9_-]+$"
ENTRY_KEYS = ("stage", "name", "from")  # the keys of an entry that are not its stage's own


class RuntimeSection(BaseModel):
    """Where and how fast: never part of a fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a stage; null: all cores")
    workers: int | None = Field(default=None, ge=1, description="processes that tokenise; null: all cores")
    ray: Annotated[str, Field(pattern=r"^(auto|(ray://)?[^\s/]+:\d+)$")] | None = Field(
        default=None,
        description="null: the teacher runs here; auto: on this machine's Ray cluster, started where there is none; "
        "HOST:PORT: on that cluster",
    )
    ray_workers: int | None = Field(
        default=None, ge=1, description="teachers at once on Ray; null: one a GPU, else one a machine or `threads` CPUs"
    )
    python: dict[str, str] = Field(
        default_factory=dict, description="stage name: path of the interpreter that runs it (it must have lmdistill)"
    )

    launch: LaunchSection | None = Field(
        default=None, description="train with several processes of this machine; null: with one"
    )

    def for_stages(self) -> Runtime:
        """What a stage is told of it."""
        return Runtime(self.device, self.threads, self.workers, self.ray, self.ray_workers, self.launch)


class Header(BaseModel):
    """The recipe's own keys; `stages` is checked entry by entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = Field(description="names the run folder: runs/<name>")
    teacher: AssetSpec | None = Field(default=None, description="the model to distil from")
    runtime: RuntimeSection = Field(default_factory=RuntimeSection, description="where and how fast")
    extends: str | None = Field(default=None, description="another recipe, on which this one is laid")
    stages: Any = Field(description="the list of stages, in the order they run")


@dataclass(frozen=True)
class Entry:
    """One stage of a recipe, checked; `inputs` names for each role the entries that play it."""

    name: str
    stage: Stage[Any]
    config: StageConfig
    inputs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked and wired."""

    name: str
    file: Path
    teacher: AssetSpec | None
    runtime: RuntimeSection
    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry:
        """The entry called `name`."""
        return next(entry for entry in self.entries if entry.name == name)
