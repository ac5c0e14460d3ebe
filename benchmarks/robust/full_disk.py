"""A disk that fills up during a capture: a small tmpfs where root may mount one, and a limit on file sizes anywhere."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from robust.toy_run import ToyRun, cache_files, fresh_copy

SHARE = 0.5  # of the cache that fits at first
LOGS = 200_000  # bytes for what the pipeline itself writes


def fill_tmpfs(toy: ToyRun, base: Path, expected: dict[str, str], scratch: Path) -> dict[str, Any]:
    """Run on a tmpfs that holds half the cache, enlarge it, and run again; `skipped` says why where none can be had."""
    folder = scratch / "small"
    folder.mkdir()
    needed = _size(base) + _cache_bytes(scratch / "whole")
    room = _size(base) + int(_cache_bytes(scratch / "whole") * SHARE) + LOGS
    refusal = _mount(folder, room)
    if refusal:
        return {"skipped": refusal}
    try:
        run_dir = fresh_copy(base, folder / "run")
        full = toy.run(run_dir)
        kept = _finished(run_dir)
        subprocess.run(["mount", "-o", f"remount,size={needed * 2 + 4_000_000}", str(folder)], check=True)
        resumed = toy.run(run_dir)
        return _verdict(full, kept, resumed, run_dir, expected)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def limit_file_size(toy: ToyRun, base: Path, expected: dict[str, str], scratch: Path) -> dict[str, Any]:
    """Run where no file may grow beyond half a shard, then without that limit."""
    run_dir = fresh_copy(base, scratch / "limited")
    biggest = max(path.stat().st_size for path in (scratch / "whole").glob("*-teach-*/out/*.sig"))
    most = max(biggest // 2, 1)
    limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # noqa: E731
    command = toy.command(run_dir)
    full = subprocess.run(**command, capture_output=True, check=False, preexec_fn=limits)
    kept = _finished(run_dir)
    resumed = toy.run(run_dir)
    return {"largest_file": most, **_verdict(full, kept, resumed, run_dir, expected)}


def _verdict(
    full: subprocess.CompletedProcess[str],
    kept: int,
    resumed: subprocess.CompletedProcess[str],
    run_dir: Path,
    expected: dict[str, str],
) -> dict[str, Any]:
    return {
        "exit_status": full.returncode,
        "message": full.stderr.strip().splitlines(),
        "traceback": "Traceback" in full.stderr + full.stdout,
        "finished_shards": kept,
        "resumed_exit_status": resumed.returncode,
        "same_bytes": resumed.returncode == 0 and cache_files(run_dir) == expected,
    }


def _mount(folder: Path, size: int) -> str:
    """Mount a tmpfs; why it cannot be, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        return "only root on Linux can mount a tmpfs"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    return done.stderr.strip() if done.returncode else ""


def _finished(run_dir: Path) -> int:
    return len(list(run_dir.glob(".partial-teach-*/out/*-*.json")))


def _size(folder: Path) -> int:
    pages = [-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()]
    return sum(pages)


def _cache_bytes(run_dir: Path) -> int:
    return sum(_size(out) for out in run_dir.glob("*-teach-*/out"))
