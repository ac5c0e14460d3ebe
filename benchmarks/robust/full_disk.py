"""A disk that fills up during a capture: a small tmpfs where root may mount one, and a limit on file sizes anywhere."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from robust.toy_run import ToyRun, cache_files, fresh_copy

SHARE = 0.5  # of the cache that fits at first
ROOM = 4  # times what the run needs: an estimate's margin, logs, and unfinished files
CHUNKS = (1 << 20, 1 << 12, 1)  # bytes in which the ballast grows until nothing more fits


def fill_tmpfs(toy: ToyRun, base: Path, expected: dict[str, str], scratch: Path) -> dict[str, Any]:
    """On a tmpfs with too little room the plan is refused; on one that others fill up meanwhile the capture fails.

    Then there is room again. `skipped` says why where no tmpfs can be mounted.
    """
    folder = scratch / "small"
    folder.mkdir()
    cache = _size(next((scratch / "whole").glob("*-teach-*/out")))
    refusal = _mount(folder, _size(base) + int(cache * SHARE))
    if refusal:
        folder.rmdir()
        return {"skipped": refusal}
    try:
        run_dir = fresh_copy(base, folder / "run")
        refused = toy.run(run_dir)
        room = ROOM * (_size(base) + cache)
        subprocess.run(["mount", "-o", f"remount,size={room}", str(folder)], check=True)
        full = _fill_meanwhile(toy, run_dir, folder / "ballast")
        kept = _finished(run_dir)
        (folder / "ballast").unlink()
        resumed = toy.run(run_dir)
        before = {"exit_status": refused.returncode, "message": refused.stderr.strip().splitlines()}
        return {"before_work": before, **_verdict(full, kept, resumed, run_dir, expected)}
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def _fill_meanwhile(toy: ToyRun, run_dir: Path, ballast: Path) -> subprocess.CompletedProcess[str]:
    """Start the run, leave no byte free as soon as it has finished a shard, and wait for its end."""
    process = toy.start(run_dir)
    while process.poll() is None and not _finished(run_dir):
        time.sleep(0.002)
    with ballast.open("wb", buffering=0) as file:
        for size in CHUNKS:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    shown, said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, shown, said)


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
    """Bytes that a folder's files take in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())
