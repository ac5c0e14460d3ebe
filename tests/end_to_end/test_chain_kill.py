"""kill -9 during teach, distill and export, then the same command: the same bytes as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from chain import Chain, digests

SECONDS = 600  # to wait for evidence of work: the machine may have other work
COMMAND = ("--until", "files")
# what shows that a stage has something to lose: two glob patterns below its partial folder, an early and a later one
EVIDENCE = {
    "teach": ("out/train-00001.json", "out/train-00008.json"),
    "distill": ("work/checkpoints/checkpoint-*/complete", "work/checkpoints/checkpoint-2?/complete"),
    "files": ("out/files-F32.gguf", "out/files-Q4_0.gguf"),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a death on Linux only")


class Running:
    """The command, at work in the background."""

    def __init__(self, chain: Chain, arguments: Sequence[str] = COMMAND) -> None:
        self.chain = chain
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(**chain.command(*arguments), stdout=pipe, stderr=pipe)

    def wait_for(self, stage: str, pattern: str) -> None:
        """Until the stage's partial folder holds what the pattern says."""
        deadline = time.monotonic() + SECONDS
        while not list(self.chain.run_dir.glob(f".partial-{stage}-*/{pattern}")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"{pattern} never came"
            time.sleep(0.002)

    def kill_all(self) -> None:
        """kill -9 of the pipeline and of all that it started."""
        everyone = [psutil.Process(self.process.pid), *self.children()]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        assert not psutil.wait_procs(everyone, timeout=10)[1]

    def kill_child(self) -> str:
        """kill -9 of the stage's process alone; the pipeline's message."""
        (child,) = self.children()
        os.kill(child.pid, signal.SIGKILL)
        shown, message = self.process.communicate()
        assert self.process.returncode == 2, shown
        return message

    def children(self) -> list[psutil.Process]:
        """The stage's process, and what it may have started."""
        return psutil.Process(self.process.pid).children(recursive=True)


def test_the_same_bytes_after_every_kill(finished: Chain, upto: Callable[..., Chain]) -> None:
    """Each stage is killed twice, first alone and then with the pipeline, always with something to lose."""
    chain = upto("corpus", "student", "ce")
    for stage, (early, late) in EVIDENCE.items():
        running = Running(chain)
        running.wait_for(stage, early)
        message = running.kill_child()
        assert message.startswith(f"error: stage '{stage}' was killed by signal 9 (SIGKILL)"), message
        assert "the same command goes on from where it stopped" in message
        assert "Traceback" not in message
        (partial,) = chain.run_dir.glob(".partial-*")
        running = Running(chain)
        running.wait_for(stage, late)
        running.kill_all()
        assert list(chain.run_dir.glob(".partial-*")) == [partial], "the kill came when the stage had ended"
    shown = chain.succeed(*COMMAND)
    assert "files: resumed" in shown
    whole = digests(finished.run_dir)
    after = digests(chain.run_dir)
    assert set(EVIDENCE) <= {Path(name).name.split("-")[1] for name in after}
    assert after == {name: whole[name] for name in after}
    assert not list(chain.run_dir.glob(".partial-*"))
