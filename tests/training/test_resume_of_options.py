"""Train 2N steps = train N, stop, resume N, bit for bit, whatever option is on; other data than before is refused."""

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
from training_toys import LENGTH, folder_bytes, train_toy

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.stage import Artefact
from lmdistill.signals.exchange.merge import merge

KEYS = {"checkpoint_steps": 2}
SHORT = {"tokens": LENGTH * 8 * 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "weight_schedule": {"kd_weight_schedule": {"to": 0.1, "shape": "cosine", "after": 0.2}},
    "temperature_schedule": {"temperature": 4.0, "temperature_schedule": {"to": 1.0, "shape": "linear"}},
    "curriculum": {"curriculum": {"buckets": 4, "pacing": "root", "until": 0.7}},
    "token_weights": {"token_weights": {"by": "gap", "of": "kd"}},
    "adapter": {"lora": {"rank": 4, "dropout": 0.1}},
    "batch_tokens": {"batch_tokens": 200, "gradient_checkpointing": True},
    "curriculum_by_gap": {"curriculum": {"difficulty": "loss_gap", "buckets": 4}},
}


@pytest.mark.parametrize("keys", OPTIONS.values(), ids=OPTIONS)
def test_half_and_resumed_is_whole(keys: dict[str, Any], signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    """What is left of the second run is its sealed checkpoint in the middle: all that a resume may need is in it."""
    train_toy(tmp_path / "whole", signals, student, **KEYS, **SHORT, **keys)
    work = tmp_path / "whole/work"
    steps = sorted(int(path.name.split("-")[1]) for path in (work / "checkpoints").glob("checkpoint-*"))
    shutil.copytree(work, tmp_path / "half/work")
    shutil.rmtree(tmp_path / f"half/work/checkpoints/checkpoint-{steps[-1]}")
    assert 0 < steps[-2] < steps[-1]
    train_toy(tmp_path / "half", signals, student, **KEYS, **SHORT, **keys)
    assert folder_bytes(tmp_path / "whole/out") == folder_bytes(tmp_path / "half/out")


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lmdistill.pipeline.stage import Artefact
from lmdistill.signals.exchange.merge import merge
from training_toys import train_toy
signals = Artefact("teach", "teach", "signals", "e" * 64, Path(sys.argv[3]))
student = Artefact("student", "student", "student", "d" * 64, Path(sys.argv[4]))
train_toy(Path(sys.argv[2]), signals, student, **json.loads(sys.argv[5]))
"""


def all_options() -> dict[str, Any]:
    keys = {**KEYS}
    for name, option in OPTIONS.items():
        keys |= option if name != "batch_tokens" else {}  # no curriculum goes with it
    return keys


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(all_options(), id="all_options"),
        pytest.param({**KEYS, "compile": True}, id="compile", marks=needs_compiler),
    ],
)
def test_killed_the_same_command_ends_with_the_same_bytes(
    keys: dict[str, Any], signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    train_toy(tmp_path / "whole", signals, student, **keys)
    arguments = [Path(__file__).parent, tmp_path / "killed", signals.path, student.path, json.dumps(keys)]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)])
    deadline = time.monotonic() + 600
    while not list((tmp_path / "killed").glob("work/checkpoints/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/out/training.json").exists()
    train_toy(tmp_path / "killed", signals, student, **keys)
    assert folder_bytes(tmp_path / "whole/out") == folder_bytes(tmp_path / "killed/out")


def test_other_data_than_before_is_refused(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    """Its digest is held against that of the checkpoints, before a step is made."""
    train_toy(tmp_path / "run", signals, student, **KEYS, **SHORT)
    merge(tmp_path / "other/out", [signals.out, signals.out])
    other = Artefact("teach", "teach", "signals", "e" * 64, tmp_path / "other")
    with pytest.raises(IntegrityError, match="made with other signals"):
        train_toy(tmp_path / "run", other, student, **KEYS, **SHORT)
