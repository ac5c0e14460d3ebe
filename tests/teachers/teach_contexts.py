"""The contexts that the teach stage is checked and run in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageConfig, StageContext
from lmdistill.stages.teach import TeachConfig


def before(teacher: ModelRef | None, artefact: Artefact, folder: Path, **config: Any) -> PreflightContext[TeachConfig]:
    """What the stage's preflight is given."""
    planned = Planned("corpus", "corpus", "corpus", "f" * 64, StageConfig(), artefact=artefact)
    return PreflightContext("teach", TeachConfig(**config), {"corpus": [planned]}, teacher, folder)


def running(teacher: ModelRef, artefact: Artefact, out: Path, **config: Any) -> StageContext[TeachConfig]:
    """What the stage's run is given; its scratch folder lies beside `out`."""
    settings = TeachConfig(**({"k": 8, "shard_rows": 4, "batch_rows": 2} | config))
    work, runtime = out.with_name(f"{out.name}-work"), Runtime(device="cpu", threads=1)
    return StageContext("teach", settings, {"corpus": [artefact]}, teacher, out, work, runtime=runtime)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
