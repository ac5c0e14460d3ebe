"""`runtime.ray: auto` through the command line: stopped, killed, a worker killed; then the bytes of one process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from robust import toy_run

pytest.importorskip("ray")
ROWS, SHARD_ROWS = 1024, 16
SECONDS = 300.0  # to wait for evidence of work: the machine may have other work


class Running:
    """A capture on Ray, at work in the background."""

    def __init__(self, toy: toy_run.ToyRun, run_dir: Path) -> None:
        self.run_dir = run_dir
        before = len(self.records())
        self.process = toy.start(run_dir)
        deadline = time.monotonic() + SECONDS
        while len(self.records()) < before + 2:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "no shard was ever finished"
            time.sleep(0.005)
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.working = [child for child in self.children if child.name().startswith(("raylet", "gcs", "ray::Shard"))]

    def records(self) -> list[Path]:
        return list(self.run_dir.glob(".partial-teach-*/out/*-*.json"))

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.children if child.cmdline() and child.cmdline()[0].startswith("ray::ShardWork")]

    def at_work(self) -> psutil.Process:
        """A worker that has a shard: its teacher is loaded, and more shards are left than it could have scored."""
        notes = re.findall(r"process (\d+): its teacher is loaded", (self.run_dir / "events.jsonl").read_text())
        return next(worker for worker in self.workers() if str(worker.pid) in notes)

    def end(self, number: signal.Signals, victim: psutil.Process | subprocess.Popen[str]) -> tuple[int, str]:
        """Send a signal and wait; exit status and message."""
        victim.send_signal(number)
        _, message = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, message


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a death on Linux only")
def test_stopped_killed_and_bereft_of_a_worker_it_ends_with_the_same_bytes(tmp_path):
    """Ctrl-C is status 130; neither it nor kill -9 leaves a process of Ray; a killed worker stops nothing."""
    toy = toy_run.make(tmp_path / "toy", "mmap", ROWS, SHARD_ROWS)
    toy.succeed(tmp_path / "base", "--until", "corpus")
    toy.succeed(toy_run.fresh_copy(tmp_path / "base", tmp_path / "whole"))
    on_ray = replace(toy, settings=("--set", "runtime.ray=auto", "--set", "runtime.ray_workers=2"))
    run_dir = toy_run.fresh_copy(tmp_path / "base", tmp_path / "ray")

    running = Running(on_ray, run_dir)
    assert len(running.workers()) == 2
    status, message = running.end(signal.SIGINT, running.process)
    assert (status, message) == (130, "stopped; the same command goes on from where it stopped\n")
    assert not psutil.wait_procs(running.children, timeout=20)[1]

    running = Running(on_ray, run_dir)
    assert running.end(signal.SIGKILL, running.process)[0] == -signal.SIGKILL
    killed = running.children
    assert len(running.working) >= 4, killed  # Ray's two servers and two workers
    assert not psutil.wait_procs(running.working, timeout=20)[1]

    running = Running(on_ray, run_dir)
    status, message = running.end(signal.SIGKILL, running.at_work())  # the other may still load its teacher
    assert status == 0, message
    assert "is lost with shard" in (run_dir / "events.jsonl").read_text()
    assert toy_run.cache_files(run_dir) == toy_run.cache_files(tmp_path / "whole")
    assert not psutil.wait_procs(killed, timeout=SECONDS)[1]  # Ray's agents look for it now and then, for a minute
