"""Device benchmarks as llama-bench does them: prefill, decode and peak memory of every file, side by side.

Each file lives in a process of its own, so that its peak memory is its own. In each round every file is timed
once, one after the other, with the same threads, and the next round goes backwards: what drifts (heat, other work)
drifts for all of them, and nobody always comes after the same file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from lmdistill.errors import StageError

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SpeedTarget:
    """A model to time."""

    name: str
    runtime: str
    path: Path


@dataclass(frozen=True)
class SpeedPlan:
    """Sizes in tokens, and how often."""

    prefill: int
    decode: int
    repeats: int
    threads: int
    device: str = "cpu"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest and the quartiles of repeated measurements, and those themselves, in order."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "q1": low,
        "q3": high,
        "rounds": list(values),
    }


class Worker:
    """A subprocess that holds one open model; a context manager."""

    def __init__(self, target: SpeedTarget, plan: SpeedPlan, log: Path) -> None:
        self.target, self._log = target, log
        job = {
            "runtime": target.runtime,
            "path": str(target.path),
            "context": max(plan.prefill, plan.decode),
            "threads": plan.threads,
            "device": plan.device,
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmdistill.evaluation.speed_worker", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Worker:
        self._answer()
        return self

    def ask(self, what: Phase | Literal["peak_rss_bytes"], tokens: int = 0) -> float:
        """Seconds of a phase, or the peak memory in bytes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([what, tokens]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"its process ended with status {self._process.returncode}"
        raise StageError(f"timing {self.target.name} failed", why=why, fix=f"see {self._log}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._process.communicate()  # closing its input ends it
        else:
            self._process.kill()
            self._process.communicate()


@dataclass(frozen=True)
class Task:
    """What every file does once in each round."""

    name: str
    phase: Phase
    tokens: int


@dataclass(frozen=True)
class Timed:
    """What one file did: seconds of each task, round by round, and its process's peak memory."""

    seconds: dict[str, list[float]]
    peak_rss_bytes: int


def time_in_turns(
    targets: Sequence[SpeedTarget],
    plan: SpeedPlan,
    tasks: Sequence[Task],
    logs: Path,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Timed]:
    """Seconds of each task of each target by name; the first, untimed round warms every model up.

    The sizes in `plan` only say how long the longest sequence is.
    """
    logs.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, dict[str, list[float]]] = {t.name: {task.name: [] for task in tasks} for t in targets}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(target, plan, logs / f"speed-{place:02d}.log"))
            for place, target in enumerate(targets)
        ]
        for turn in range(plan.repeats + 1):
            order = workers[::-1] if turn % 2 else workers  # who comes right after whom shall not favour anyone
            for task in tasks:
                for worker in order:
                    taken = worker.ask(task.phase, task.tokens)
                    if turn > 0:
                        seconds[worker.target.name][task.name].append(taken)
            on_round(turn + 1)
        peaks = {worker.target.name: int(worker.ask("peak_rss_bytes")) for worker in workers}
    return {name: Timed(seconds[name], peaks[name]) for name in seconds}


def measure(
    targets: Sequence[SpeedTarget],
    plan: SpeedPlan,
    logs: Path,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Tokens a second and peak memory of each target by name."""
    tasks = (Task("prefill", "prefill", plan.prefill), Task("decode", "decode", plan.decode))
    timed = time_in_turns(targets, plan, tasks, logs, on_round)
    return {
        name: {
            **{f"{task.name}_tps": spread([task.tokens / s for s in each.seconds[task.name]]) for task in tasks},
            "peak_rss_bytes": each.peak_rss_bytes,
        }
        for name, each in timed.items()
    }
