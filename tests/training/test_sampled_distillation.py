"""Distillation on a sampled cache: it learns, towards the teacher; the wrong loss for a cache is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageContext
from lmdistill.stages.distill import DistillConfig, DistillStage
from lmdistill.stages.teach import TeachConfig, TeachStage

KEYS = {"tokens": 32 * 8 * 12, "batch_rows": 8, "lr": 0.2, "precision": "float32", "log_steps": 2}


@pytest.fixture(scope="module")
def drawn(teacher: ModelRef, corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The toy teacher's sampled cache."""
    path = tmp_path_factory.mktemp("drawn")
    (path / "out").mkdir()
    config = TeachConfig(variant="sampled", shard_rows=8, batch_rows=4)
    place = (path / "out", path / "work")
    TeachStage().run(StageContext("teach", config, {"corpus": [corpus]}, teacher, *place, runtime=Runtime("cpu")))
    return Artefact("teach", "teach", "signals", "e" * 64, path)


def _context(folder: Path, signals: Artefact, student: Artefact, **keys: object) -> StageContext[DistillConfig]:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    inputs = {"signals": [signals], "student": [student]}
    config = DistillConfig.model_validate({**KEYS, **keys})
    return StageContext("distill", config, inputs, None, folder / "out", folder / "work", runtime=Runtime("cpu", 1))


def test_a_student_of_drawn_ids_comes_as_near_to_the_teacher_as_one_of_the_top_k(
    signals: Artefact, drawn: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """Its own loss, an estimate of the full KL, falls; and it ends where the sampled loss says it does."""
    logs = {}
    for loss, cache in (("sampled_kd", drawn), ("decoupled_topk", signals)):
        ctx = _context(tmp_path / loss, cache, student, loss=loss, kd_weight=1.0)
        DistillStage().run(ctx)
        logs[loss] = json.loads((ctx.out / "training.json").read_text())["log"]
    first, last = (logs["sampled_kd"][place]["kd"] for place in (0, -1))
    assert last < 0.9 * first
    assert logs["sampled_kd"][-1]["ce"] == pytest.approx(logs["decoupled_topk"][-1]["ce"], rel=0.1)


@pytest.mark.parametrize("loss", ["sampled_kd", "decoupled_topk"])
def test_the_wrong_cache_for_a_loss_is_refused_before_and_at_the_run(
    loss: str, signals: Artefact, drawn: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """By name, with what to do; the right pair and cross-entropy pass."""
    variant, wrong, right = ("mmap", signals, "sampled") if loss == "sampled_kd" else ("sampled", drawn, "mmap")

    def problems(variant: str, loss: str) -> list[str]:
        planned = Planned("cache", "teach", "signals", "e" * 64, TeachConfig(variant=variant))
        config = DistillConfig(loss=loss)
        found = DistillStage().preflight(PreflightContext("distill", config, {"signals": [planned]}, None, tmp_path))
        return [error.render() for error in found]

    [problem] = problems(variant, loss)
    assert f"loss '{loss}'" in problem and "stage 'cache'" in problem and "do:  set `" in problem
    assert problems(right, loss) == problems(variant, "ce") == []
    with pytest.raises(PreflightError, match=f"loss '{loss}' learns from"):
        DistillStage().run(_context(tmp_path / "run", wrong, student, loss=loss))
