"""Killed at any moment, the same command goes on, and every artefact comes out as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from toys.fixtures import manifests

Run = Callable[..., subprocess.CompletedProcess[str]]
SLOW = ("--set", "stages.learn.pause=0.15", "--set", "stages.again.pause=0.15")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lmdistill", "pipeline", "toy.yaml", *SLOW, *arguments]
    # A shell that runs the tests in the background has Ctrl-C ignored, and children inherit that.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def wait_for(pattern: str, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments(seed: int, write: Callable[..., Path], lmdistill: Run) -> None:
    write()
    chance = random.Random(seed)
    for _ in range(2):
        process = start("--run-dir", "killed")
        time.sleep(chance.uniform(0.3, 4.0))
        process.kill()
        process.communicate()
    assert lmdistill("pipeline", "toy.yaml", "--run-dir", "killed").returncode == 0
    assert lmdistill("pipeline", "toy.yaml", "--run-dir", "whole").returncode == 0
    assert manifests(Path("killed")) == manifests(Path("whole"))
    assert len(manifests(Path("killed"))) == 4


def test_a_worker_dies_with_its_parent(write: Callable[..., Path]) -> None:
    if sys.platform != "linux":
        pytest.skip("the kernel tells children on Linux only")
    write()
    process = start("--set", "stages.learn.pause=30")
    wait_for("runs/toy/.partial-learn-*/work.lock", Path())
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_ctrl_c_stops_and_says_how_to_go_on(write: Callable[..., Path]) -> None:
    write()
    process = start("--set", "stages.learn.pause=30")
    wait_for("runs/toy/.partial-learn-*/work.lock", Path())
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr == "stopped; the same command goes on from where it stopped\n"
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert "run_interrupted" in Path("runs/toy/events.jsonl").read_text()
