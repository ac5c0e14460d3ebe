"""One pipeline a run folder: a file lock that dies with its process, and a note of who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from lmdistill.errors import LockedError


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder; LockedError names the process that holds it already."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock.json"
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LockedError(
            f"another pipeline is working in {folder}",
            why=_who(holder),
            fix="wait for it, stop it, or give this one a folder of its own with --run-dir",
        ) from error
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its lock is held"
    return f"process {found['pid']} on {found['host']} holds its lock"
