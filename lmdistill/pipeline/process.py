"""The parent's side of a worker process: start it, pass on its messages, and say in one error why it failed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lmdistill.errors import LmdistillError, PreflightError, StageError
from lmdistill.pipeline.jobs import Json, error_from_json

LAST_WORDS = 2.0  # seconds that an ended child's output may still take to arrive
OUT_OF_MEMORY = re.compile(r"MemoryError|out of memory|(can't|cannot|could not) allocate", re.IGNORECASE)
OnMessage = Callable[[Json], None]
RESUME = "the same command goes on from where it stopped"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # a stage reads what was fetched before it


def call(job: Json, subject: str, python: str, log: Path | None, on_message: OnMessage, program: str = "worker") -> Any:
    """Do `job` in a process of its own and return its result; `subject` names it in errors.

    `program` is the module that does it: `worker`, or `launcher` for several processes.

    Raises what the job raised; StageError when it crashed or was killed; KeyboardInterrupt after stopping it.
    """
    job = job | {"parent": os.getpid()}
    with _log_file(log) as stderr:
        try:
            process = subprocess.Popen(
                [python, "-P", "-m", f"lmdistill.pipeline.{program}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(job),
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is the parent's to handle; helpers of a stage are stopped with it
            )
        except OSError as error:
            fix = "correct runtime.python in the recipe"
            raise PreflightError(f"{subject}: cannot start {python}", why=str(error), fix=fix) from error
        try:
            return _converse(process, job, subject, log, on_message)
        except BaseException:
            _stop(process)
            raise
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _environment(job: Json) -> dict[str, str]:
    from lmdistill.assets import cache_dir

    env = {"HF_DATASETS_CACHE": str(cache_dir() / "datasets"), **os.environ}
    env["PYTHONHASHSEED"] = "0"  # nothing may depend on the order of a set
    if threads := job["runtime"]["threads"]:
        env["OMP_NUM_THREADS"] = str(threads)
    return env if job["task"] == "fetch" else env | OFFLINE


@contextlib.contextmanager
def _log_file(log: Path | None) -> Iterator[int | IO[str]]:
    if log is None:
        yield subprocess.DEVNULL
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        yield file


def _converse(process: subprocess.Popen[str], job: Json, subject: str, log: Path | None, on_message: OnMessage) -> Any:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a child that died at once is reported below
        json.dump(job, process.stdin)
        process.stdin.close()
    final: Json | None = None
    for message in _messages(process):
        if message["type"] in ("result", "error", "crash"):
            final = message
        else:
            on_message(message)
    code = process.wait()
    if final is not None and final["type"] == "result" and code == 0:
        return final["result"]
    raise _failure(final, code, subject, log)


def _messages(process: subprocess.Popen[str]) -> Iterator[Json]:
    """The child's messages until it ends; a helper process of a stage that lives on does not hold this up."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    ended: float | None = None
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if process.poll() is None:
                continue
            ended = ended or time.monotonic()  # its last words may still be in the pipe: this process may have slept
            if time.monotonic() - ended > LAST_WORDS:
                return
            continue
        if line is None:
            return
        yield json.loads(line)


def _failure(final: Json | None, code: int, subject: str, log: Path | None) -> LmdistillError:
    where = f"its log is {log}" if log else "LMDISTILL_TRACEBACK=1 shows where"
    if final is not None and final["type"] == "error":
        error = error_from_json(final["error"])
        if log is not None:
            error.add_note(str(log))
        return error
    if final is not None and final["type"] == "crash":
        if os.environ.get("LMDISTILL_TRACEBACK"):
            print(final["traceback"], file=sys.stderr)
        why = "it ran out of memory" if OUT_OF_MEMORY.search(final["error"]) else ""
        return StageError(f"{subject} failed: {final['error']}", why=why, fix=f"{where}; {RESUME}")
    if code < 0:
        name = signal.Signals(-code).name
        why = "perhaps the machine ran out of memory" if -code == signal.SIGKILL else ""
        return StageError(f"{subject} was killed by signal {-code} ({name})", why=why, fix=f"{where}; {RESUME}")
    what = f"{subject} ended with status {code} and no result"
    return StageError(what, why=_last_line(log), fix=f"{where}; {RESUME}")


def _last_line(log: Path | None) -> str:
    """The last thing that was printed, often the reason."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _stop(process: subprocess.Popen[str]) -> None:
    """End the child: asked first, then killed."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
