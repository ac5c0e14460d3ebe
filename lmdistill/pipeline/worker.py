"""The process in which stages run: reads one job from stdin, sends messages as JSON lines, dies with its parent.

Started by `lmdistill.pipeline.process`, never by hand. Whatever a stage prints goes to its log.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import LmdistillError, LockedError, StageError
from lmdistill.pipeline import jobs
from lmdistill.pipeline.stage import PreflightContext, StageContext
from lmdistill.pipeline.store import LOCK
from lmdistill.stages import load_stage

EVERY = 0.05  # seconds between two progress messages of one unit of work


class Channel:
    """The way to the parent; also the `Progress` that stages are given."""

    def __init__(self) -> None:
        """Keep stdout for messages and send everything that is printed to stderr, the log."""
        self.file = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self.last = 0.0

    def send(self, kind: str, **fields: Any) -> None:
        """One message."""
        self.file.write(json.dumps({"type": kind, **fields}, default=_plain) + "\n")

    def update(self, done: float, total: float, unit: str = "", **figures: float | str) -> None:
        """Progress, at most every 50 ms but for its end."""
        now = time.monotonic()
        if now - self.last < EVERY and done < total:
            return
        self.last = now
        shown = {key: _finite(value) for key, value in figures.items()}
        self.send("progress", done=_finite(done), total=_finite(total), unit=unit, figures=shown)

    def note(self, text: str) -> None:
        """One line worth keeping."""
        self.send("note", text=text)


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch, and paths, as JSON has them."""
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def peak_rss_bytes() -> int | None:
    """The most memory this process had resident, plus the most of the largest process it has waited for."""
    if sys.platform == "win32":
        return None
    import resource

    units = 1 if sys.platform == "darwin" else 1024
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return units * sum(peaks)


def run(job: jobs.Json, channel: Channel) -> Any:
    """Run one stage and check its postconditions; returns its metrics."""
    from filelock import FileLock, Timeout

    partial = Path(job["partial"])
    stage = load_stage(job["stage"])
    ctx = StageContext(
        name=job["name"],
        config=stage.Config.model_validate(job["config"]),
        inputs={role: [jobs.artefact_from_json(one) for one in many] for role, many in job["inputs"].items()},
        teacher=jobs.model_from_json(job["teacher"]),
        out=partial / "out",
        work=partial / "work",
        progress=channel,
        runtime=jobs.runtime_from_json(job["runtime"]),
    )
    if not ctx.runtime.first:  # of several processes the first holds the lock, and speaks for all
        stage.run(ctx)
        return None
    try:
        with FileLock(partial / LOCK, timeout=10):
            metrics = stage.run(ctx)
            stage.verify(ctx, metrics)
        channel.send("memory", peak_rss_bytes=peak_rss_bytes())
    except Timeout as error:
        what = f"another process is still working in {partial}"
        raise LockedError(what, fix="wait until it has ended, or stop it") from error
    return json.loads(json.dumps(metrics, default=_plain, allow_nan=False, sort_keys=True))


def preflight(job: jobs.Json, _channel: Channel) -> Any:
    """Check and estimate the named stages; returns per stage its errors and its estimate."""
    planned = jobs.planned_from_json(job["planned"])
    found = {}
    for name in job["stages"]:
        one = planned[name]
        stage = load_stage(one.stage)
        ctx: PreflightContext[Any] = PreflightContext(
            name=name,
            config=one.config,
            inputs=one.inputs,
            teacher=jobs.model_from_json(job["teacher"]),
            run_dir=Path(job["run_dir"]),
            runtime=jobs.runtime_from_json(job["runtime"]),
        )
        problems: list[LmdistillError] = []
        estimate: jobs.Json = {}
        try:
            problems += stage.preflight(ctx)
            estimate = dataclasses.asdict(stage.estimate(ctx))
        except LmdistillError as error:  # an estimate often stumbles over what the preflight has said already
            if error.render() not in [problem.render() for problem in problems]:
                problems.append(error)
        except Exception as error:  # a stage may raise anything: this says whose preflight it was
            raise StageError(f"the preflight of stage '{name}' failed: {type(error).__name__}: {error}") from error
        found[name] = {"errors": [jobs.error_to_json(error) for error in problems], "estimate": estimate}
    return found


def fetch(job: jobs.Json, channel: Channel) -> Any:
    """Bring data and teachers to this machine."""
    from lmdistill import assets

    for spec in job["assets"]:
        channel.note(f"fetching {spec['source']}")
        assets.fetch(AssetSpec.model_validate(spec), channel)
    for spec in job["models"]:
        channel.note(f"fetching the teacher {spec['source']}")
        assets.model_folder(AssetSpec.model_validate(spec), channel)
    return None


TASKS = {"run": run, "preflight": preflight, "fetch": fetch}


def die_with_parent(parent: int) -> None:
    """On Linux the kernel kills this process when its parent dies, so that no orphan writes on."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)


def log_traceback() -> None:
    """Where the error came from, into the log; which is on the disk that may be full."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def perform(job: jobs.Json, channel: Channel) -> tuple[jobs.Json, int]:
    """Do one job: the message that says what came of it, and the exit status."""
    try:
        return {"type": "result", "result": TASKS[job["task"]](job, channel)}, 0
    except LmdistillError as error:
        log_traceback()
        return {"type": "error", "error": jobs.error_to_json(error)}, 3
    except BaseException as error:  # a stage may raise anything: it is reported, and the log has the traceback
        log_traceback()
        return {"type": "crash", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, 4


def main() -> int:
    """Do one job; 0 when its result was sent."""
    channel = Channel()
    job = json.load(sys.stdin)
    die_with_parent(job["parent"])
    message, status = perform(job, channel)
    channel.send(message.pop("type"), **message)
    return status


def leave(status: int) -> NoReturn:
    """End at once: what came of the job is sent and checked, and to take torch apart would take seconds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log, on a disk that may be full
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
