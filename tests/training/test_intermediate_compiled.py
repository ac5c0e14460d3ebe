"""Compiled blocks with intermediate losses: hooks inside them see what they see without compiling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext
from lmdistill.stages.distill import DistillStage
from lmdistill.training.config import DistillConfig


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_blocks_give_the_same_curve(
    signals: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    entries = [
        {"loss": "hidden_mse", "layers": "uniform", "live": True},
        {"loss": "relation_kl", "layers": "uniform"},
    ]
    logs: list[list[dict[str, Any]]] = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        for name in ("out", "work"):
            (folder / name).mkdir(parents=True)
        keys = {"tokens": 32 * 8 * 2, "lr": 0.05, "precision": "float32", "log_steps": 1, "compile": compiled}
        config = DistillConfig.model_validate({"intermediate": entries, **keys})
        inputs = {"signals": [signals], "student": [student]}
        place = (teacher, folder / "out", folder / "work")
        DistillStage().run(StageContext("distill", config, inputs, *place, runtime=Runtime("cpu", 1)))
        logs.append(json.loads((folder / "out/training.json").read_text())["log"])
    for plain, other in zip(*logs, strict=True):
        assert other == pytest.approx(plain, rel=2e-3)
