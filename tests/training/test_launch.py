"""Several processes train as one would: the same curve; a death is one clear error, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_distill_stage import KEYS, STAGE, _train

from lmdistill.errors import LmdistillError, PreflightError, StageError
from lmdistill.pipeline.jobs import artefact_to_json
from lmdistill.pipeline.launch_keys import LaunchSection
from lmdistill.pipeline.launcher import outcome
from lmdistill.pipeline.process import call
from lmdistill.pipeline.stage import Artefact, PreflightContext, Runtime
from lmdistill.quantization.placement import Placement
from lmdistill.recipe.schema import RuntimeSection
from lmdistill.training.config import DistillConfig

LAUNCH = {"num_processes": 2}
PACED: dict[str, Any] = {"curriculum": {"difficulty": "loss_gap", "buckets": 3}}  # measured by the first alone


def _job(folder: Path, signals: Artefact, student: Artefact, **keys: Any) -> dict[str, Any]:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {
        "task": "run",
        "name": "distill",
        "stage": "distill",
        "config": DistillConfig(**KEYS | (keys or PACED)).model_dump(mode="json"),
        "inputs": {"signals": [artefact_to_json(signals)], "student": [artefact_to_json(student)]},
        "teacher": None,
        "partial": str(folder),
        "runtime": RuntimeSection(device="cpu", threads=2, launch=LAUNCH).model_dump(exclude={"python"}),
    }


def _kill(rank: int) -> None:
    for process in psutil.Process().children(recursive=True):
        if "lmdistill.pipeline.rank" in process.cmdline() and process.environ().get("RANK") == str(rank):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of another process")
def test_two_processes_one_of_them_killed_and_the_same_command_give_the_curve_of_one_process(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    folder, log = tmp_path / "two", tmp_path / "two.log"
    told: list[dict[str, Any]] = []

    def kill_the_second(message: dict[str, Any]) -> None:
        told.append(message)
        if list((folder / "work/checkpoints").glob("checkpoint-*/complete")):
            _kill(1)

    with pytest.raises(StageError) as failure:
        call(_job(folder, signals, student), "stage 'distill'", sys.executable, log, kill_the_second, "launcher")
    assert failure.value.what == "stage 'distill' failed: process 2 of 2 was killed by signal 9 (SIGKILL)", (
        log.read_text()
    )
    assert [message for message in told if message["type"] == "progress"]
    assert not (folder / "out/training.json").exists()
    kept = {path.name for path in (folder / "work/checkpoints").glob("checkpoint-*/complete")}
    metrics = call(_job(folder, signals, student), "stage 'distill'", sys.executable, log, told.append, "launcher")

    alone = _train(tmp_path / "one", signals, student, **PACED)
    record = json.loads((folder / "out/training.json").read_text())
    assert kept and metrics["steps"] == alone["steps"]
    assert [line["step"] for line in record["log"]] == [line["step"] for line in alone["log"]]
    for line, other in zip(record["log"], alone["log"], strict=True):
        assert line == pytest.approx(other, rel=2e-4, abs=2e-5)
    ours, theirs = (load_file(place / "out/model/model.safetensors") for place in (folder, tmp_path / "one"))
    for name, tensor in theirs.items():
        assert torch.allclose(tensor, ours[name], atol=2e-3), name


def test_two_processes_train_on_a_grid_and_its_learned_scales_as_one_would(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """Each has the same start, and the scales' gradients are those of all rows: both end on the same grid."""
    keys = {"quantize": {"grid": "uniform", "bits": 4, "bucket": 16, "start": "fitted", "scales": "learned"}}
    folder, told = tmp_path / "two", []
    job = _job(folder, signals, student, **keys)
    call(job, "stage 'distill'", sys.executable, tmp_path / "two.log", told.append, "launcher")
    alone = _train(tmp_path / "one", signals, student, **keys)
    record = json.loads((folder / "out/training.json").read_text())
    for line, other in zip(record["log"], alone["log"], strict=True):
        assert line["kd"] == pytest.approx(other["kd"], rel=2e-2)
    ours, theirs = (Placement.load(place / "out/model") for place in (folder, tmp_path / "one"))
    assert ours is not None and theirs is not None and ours.grids == theirs.grids
    weights = load_file(folder / "out/model/model.safetensors")
    for name, grid in ours.on_grids().items():
        assert torch.equal(grid.fake_quantise(weights[name], ours.scales[name]), weights[name]), name
        assert torch.allclose(ours.scales[name]["alpha"], theirs.scales[name]["alpha"], rtol=2e-2), name


def test_a_head_sharded_by_fsdp_is_gathered_and_learns_as_a_whole_one_does(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    script = str(Path(__file__).parent / "sharded_toy.py")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, script, str(student.out / "model"), str(signals.out), str(tmp_path)]
    running = [
        subprocess.Popen(arguments, env={**os.environ, **place, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    found = json.loads((tmp_path / "sharded.json").read_text())
    assert found["sharded"] > 0
    assert found["losses"] == pytest.approx(found["losses_whole"], rel=1e-4)
    assert found["apart"] < 1e-3 < found["moved"]


def _said(folder: Path, rank: int, kind: str, time: float) -> None:
    message = {"type": kind, "time": time, "error": {"what": f"rank {rank}"} if kind == "error" else f"rank {rank}"}
    (folder / f"rank-{rank}.json").write_text(json.dumps(message | {"result": rank}))


def test_of_several_failures_the_one_that_caused_the_others_is_told(tmp_path: Path) -> None:
    _said(tmp_path, 0, "crash", 1.0)
    _said(tmp_path, 1, "crash", 0.5)
    assert outcome(tmp_path, {0: 4, 1: 4}, 3)["error"] == "rank 1"
    assert "process 3 of 3 was killed by signal 9" in outcome(tmp_path, {0: 4, 1: 4, 2: -9}, 3)["error"]
    _said(tmp_path, 2, "error", 2.0)
    assert outcome(tmp_path, {0: 4, 1: 4, 2: 3}, 3)["error"] == {"what": "rank 2"}


def test_the_firsts_result_counts_and_its_absence_is_an_error(tmp_path: Path) -> None:
    _said(tmp_path, 1, "result", 0.1)
    assert outcome(tmp_path, {}, 2)["type"] == "crash"
    _said(tmp_path, 0, "result", 0.2)
    assert outcome(tmp_path, {}, 2)["result"] == 0


def _problems(
    folder: Path, device: str = "cpu", launch: dict[str, Any] | None = None, **keys: Any
) -> list[LmdistillError]:
    runtime = Runtime(device, launch=LaunchSection(**(launch or LAUNCH)))
    return STAGE.preflight(PreflightContext("distill", DistillConfig(**keys), {}, None, folder, runtime))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kd_weight": "auto"}, "is estimated by one process"),
        ({"batch_rows": 7}, "num_processes 2 does not divide batch_rows 7"),
        ({"batch_rows": 12, "micro_rows": 4}, "num_processes 2 × micro_rows 4 does not divide batch_rows 12"),
        ({"launch": {"num_processes": 2, "fsdp": {}}}, "spreads a model over GPUs, and this run is on the CPU"),
        ({"launch": {"num_processes": 2, "config": "none.yaml"}}, "names none.yaml, and no such file is there"),
        ({"device": "cuda:1"}, "gives every process a GPU of its own"),
        ({"device": "cuda", "launch": {"num_processes": 99}}, "asks for 99 processes, and there are"),
        (
            {"device": "cuda", "launch": {"num_processes": 1, "fsdp": {}}, "optimizer": "adamw_8bit"},
            "`optimizer: adamw_8bit` cannot be spread",
        ),
        (
            {"device": "cuda", "launch": {"num_processes": 1, "deepspeed": {}}, "quantize": {}},
            "a student on a grid cannot be spread over processes by runtime.launch.deepspeed",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused_before_work(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert any(message in problem.what for problem in _problems(tmp_path, **given)), message


def test_a_launch_that_fits_has_no_problem(tmp_path: Path) -> None:
    assert _problems(tmp_path, batch_rows=8, micro_rows=2) == []


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU"])
def test_a_configuration_of_ones_own_that_spreads_the_model_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"distributed_type: {kind}\n")
    launch = {"num_processes": 1, "config": str(tmp_path / "own.yaml")}
    told = [problem.what for problem in _problems(tmp_path, device="cuda", launch=launch, quantize={})]
    spread = "a student on a grid cannot be spread over processes by runtime.launch.config"
    assert any(spread in what for what in told) == (kind != "MULTI_GPU")


def test_a_configuration_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("distributed_type: [FSDP")
    with pytest.raises(PreflightError, match=r"own\.yaml, which runtime\.launch\.config names, is no YAML"):
        _problems(tmp_path, device="cuda", launch={"num_processes": 1, "config": str(tmp_path / "own.yaml")})


def test_two_ways_at_once_are_refused_by_the_recipe() -> None:
    with pytest.raises(ValidationError, match="name one"):
        LaunchSection(num_processes=2, fsdp={}, deepspeed={})


def test_accelerate_reads_the_configuration_that_the_keys_make(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(LaunchSection(num_processes=4, fsdp={"offload": True}).file(tmp_path)))
    assert read.distributed_type == "FSDP" and read.num_processes == 4
    assert read.fsdp_config["fsdp_version"] == 2 and read.fsdp_config["fsdp_offload_params"] is True
    read = load_config_from_file(str(LaunchSection(num_processes=2, deepspeed={"stage": 3}).file(tmp_path)))
    assert read.deepspeed_config["zero_stage"] == 3
