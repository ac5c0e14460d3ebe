"""The distill stage: it learns, a stop changes nothing, and what does not belong together is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_toys import save_word_tokenizer

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.pipeline.stage import Artefact, Planned, PreflightContext, Runtime, StageContext
from lmdistill.stages.distill import DistillConfig, DistillStage
from lmdistill.stages.teach import TeachConfig

KEYS = {
    "tokens": 32 * 8 * 12,
    "batch_rows": 8,
    "lr": 0.2,
    "precision": "float32",
    "log_steps": 2,
    "checkpoint_steps": 2,
}
STAGE = DistillStage()


def _context(folder: Path, signals: Artefact, student: Artefact, **keys: Any) -> StageContext[DistillConfig]:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    config = DistillConfig(**{**KEYS, **keys})
    inputs = {"signals": [signals], "student": [student]}
    return StageContext("distill", config, inputs, None, folder / "out", folder / "work", runtime=Runtime("cpu", 1))


def _train(folder: Path, signals: Artefact, student: Artefact, **keys: Any) -> dict[str, Any]:
    ctx = _context(folder, signals, student, **keys)
    STAGE.verify(ctx, STAGE.run(ctx))
    record: dict[str, Any] = json.loads((folder / "out" / "training.json").read_text())
    return record


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_both_losses_fall_and_the_teachers_falls_more_under_kd(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    kd = _train(tmp_path / "kd", signals, student)["log"]
    ce = _train(tmp_path / "ce", signals, student, loss="ce")["log"]
    assert kd[-1]["kd"] < 0.9 * kd[0]["kd"] and ce[-1]["ce"] < ce[0]["ce"]
    assert kd[-1]["kd"] < ce[-1]["ce"]
    assert ce[-1]["loss"] == pytest.approx(ce[-1]["ce"], rel=1e-3)


@pytest.mark.parametrize("keys", [{}, {"freeze": ("model.embed_tokens.weight",), "precision": "bfloat16"}])
def test_stopped_and_resumed_is_never_stopped(
    keys: dict[str, Any], signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    _train(tmp_path / "whole", signals, student, **keys)
    kept = tmp_path / "whole" / "work" / "checkpoints"
    newest = max(kept.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(kept, tmp_path / "resumed" / "work" / "checkpoints")
    shutil.rmtree(tmp_path / "resumed" / "work" / "checkpoints" / newest.name)
    _train(tmp_path / "resumed", signals, student, **keys)
    assert _files(tmp_path / "whole" / "out") == _files(tmp_path / "resumed" / "out")


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lmdistill.pipeline.stage import Artefact
from test_distill_stage import STAGE, _context
signals = Artefact("teach", "teach", "signals", "e" * 64, Path(sys.argv[3]))
student = Artefact("student", "student", "student", "d" * 64, Path(sys.argv[4]))
STAGE.run(_context(Path(sys.argv[2]), signals, student))
"""


def test_killed_while_training_the_same_command_ends_with_the_same_bytes(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    _train(tmp_path / "whole", signals, student)
    place = [str(Path(__file__).parent), str(tmp_path / "killed"), str(signals.path), str(student.path)]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *place])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("work/checkpoints/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "out" / "training.json").exists()
    _train(tmp_path / "killed", signals, student)
    assert _files(tmp_path / "whole" / "out") == _files(tmp_path / "killed" / "out")


def test_a_checkpoint_without_its_seal_is_not_read(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    _train(tmp_path / "whole", signals, student)
    for path in (tmp_path / "whole" / "work" / "checkpoints").glob("checkpoint-*"):
        (path / "complete").unlink()
        (path / "model.safetensors").write_bytes(b"half")
    before = _files(tmp_path / "whole" / "out")
    _train(tmp_path / "whole", signals, student)
    assert _files(tmp_path / "whole" / "out") == before


def test_accumulating_small_batches_changes_nothing_but_rounding(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    _train(tmp_path / "whole", signals, student)
    _train(tmp_path / "parts", signals, student, micro_rows=2, chunk=7)
    whole, parts = (load_file(tmp_path / name / "out/model/model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=2e-3), name


def test_frozen_parameters_stay_as_they_are(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    record = _train(tmp_path, signals, student, freeze=("*embed_tokens*", "*q_proj*"), save_grid="float32")
    before = load_file(student.out / "model/model.safetensors")
    after = load_file(tmp_path / "out/model/model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embed_tokens" in name or "q_proj" in name}
    assert record["frozen"] == sum(before[name].numel() for name in same)


def test_a_relative_step_is_blind_to_rescaling() -> None:
    from lmdistill.training.optimizer import build, step_sizes

    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    moved = []
    for scale in (1.0, 1 / 256):
        layer = torch.nn.Linear(4, 4, bias=False)
        layer.weight.data = weight * scale
        optimizer = build(layer, step_sizes(layer, 0.01, relative=True), 0.0, (0.9, 0.95))
        (layer(torch.ones(4)) / scale).sum().backward()
        optimizer.step()
        moved.append(layer.weight.data / scale)
    assert torch.allclose(moved[0], moved[1], atol=1e-5)


def test_a_glob_that_freezes_nothing_is_an_error(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    with pytest.raises(LmdistillError, match=r"`freeze: \*\.q_prj\*` matches no parameter"):
        _train(tmp_path, signals, student, freeze=("*.q_prj*",))


def test_changed_settings_or_data_refuse_to_resume(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    _train(tmp_path, signals, student)
    with pytest.raises(IntegrityError, match="made with other settings"):
        _train(tmp_path, signals, student, lr=0.1)
    with pytest.raises(IntegrityError, match="made with other student"):
        _train(tmp_path, signals, Artefact("student", "student", "student", "0" * 64, student.path))


def test_a_student_with_another_tokenizer_is_refused(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    shutil.copytree(student.path, tmp_path / "other")
    save_word_tokenizer(tmp_path / "other/out/model", prefix="x")
    other = Artefact("student", "student", "student", "d" * 64, tmp_path / "other")
    with pytest.raises(IntegrityError, match="made with another tokenizer"):
        _train(tmp_path / "run", signals, other)


def test_an_unknown_loss_is_named_before_work(tmp_path: Path) -> None:
    [problem] = STAGE.preflight(PreflightContext("distill", DistillConfig(loss="decoupled_top"), {}, None, tmp_path))
    assert "did you mean 'decoupled_topk'" in problem.what


def test_a_cache_without_the_training_split_is_named_before_work(tmp_path: Path) -> None:
    planned = Planned("teach", "teach", "signals", "e" * 64, TeachConfig(splits=("valid",)))
    [problem] = STAGE.preflight(PreflightContext("distill", DistillConfig(), {"signals": [planned]}, None, tmp_path))
    assert "trains on the split 'train'" in problem.what


def test_compiling_without_a_compiler_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = PreflightContext("distill", DistillConfig(compile=True), {}, None, tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    [problem] = STAGE.preflight(ctx)
    assert "needs g++ and Python's headers" in problem.what


def test_matrices_are_saved_on_the_float16_grid(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    _train(tmp_path, signals, student)
    for name, tensor in load_file(tmp_path / "out/model/model.safetensors").items():
        assert tensor.dtype == torch.float32
        assert tensor.ndim < 2 or torch.equal(tensor, tensor.half().float()), name


def test_a_weight_beyond_float16_is_refused_not_made_infinite() -> None:
    from lmdistill.training.run import round_matrices

    layer = torch.nn.Linear(2, 2)
    layer.weight.data[0, 0] = 70_000.0
    with pytest.raises(IntegrityError, match="save_grid: float32"):
        round_matrices(layer)
