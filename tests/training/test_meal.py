"""MEAL V2's way: an ensemble's mean as the only target, no hard labels, no weight decay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_toys import LENGTH, save_toy, train_toy

from lmdistill.checkpoints import load_model
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.teach import TeachConfig, TeachStage

KEYS = {"kd_weight": 1.0, "weight_decay": 0.0, "tokens": LENGTH * 8 * 12}


@pytest.fixture(scope="module")
def mean(
    teacher: ModelRef, corpus: Artefact, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artefact, np.ndarray, np.ndarray]:
    """The cache of two teachers, some of its tokens, and their mean probabilities."""
    path = tmp_path_factory.mktemp("mean")
    (path / "signals/out").mkdir(parents=True)
    other = save_toy(path / "other", 3, 0.4)
    config = TeachConfig.model_validate({"k": 60, "shard_rows": 8, "batch_rows": 4, "ensemble": [str(other)]})
    place = path / "signals/out", path / "signals/work"
    TeachStage().run(StageContext("teach", config, {"corpus": [corpus]}, teacher, *place, runtime=Runtime("cpu")))
    signals = Artefact("teach", "teach", "signals", "6" * 64, path / "signals")
    tokens_RT = SignalsReader(signals.out).read([0, 1, 2, 3]).tokens_RT.astype("int64")
    return signals, tokens_RT, sum(_probabilities(folder, tokens_RT) for folder in (teacher.path, other)) / 2


def _probabilities(folder: Path, tokens_RT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return load_model(folder)(torch.from_numpy(tokens_RT)).logits.softmax(-1).numpy()


def _kl(p_RTV: np.ndarray, q_RTV: np.ndarray) -> float:
    return float((p_RTV * np.log(p_RTV / q_RTV)).sum(-1).mean())


def test_the_student_nears_the_mean_of_the_teachers_and_no_label_counts(
    mean: tuple[Artefact, np.ndarray, np.ndarray], student: Artefact, tmp_path: Path
) -> None:
    signals, tokens_RT, mean_RTV = mean
    log = train_toy(tmp_path, signals, student, **KEYS)["log"]
    assert all(line["loss"] == pytest.approx(line["kd"], abs=2e-5) for line in log)
    before, after = (_probabilities(path / "out/model", tokens_RT) for path in (student.path, tmp_path))
    assert _kl(mean_RTV, after) < 0.9 * _kl(mean_RTV, before)
