"""kill -9 at random moments of a capture, again and again, then a run to the end: are the bytes what they should be?"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robust.toy_run import ToyRun, cache_files, fresh_copy, kill_all

PARTIAL = ".partial-teach-*/out"
START_SECONDS = 600.0  # for a stage to begin: the machine may have other work


def kill_many(
    toy: ToyRun, base: Path, scratch: Path, count: int, seed: int = 0, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Kill captures until `count` kills have hit one; one that ends before its kill is checked, and begun anew.

    `base` is a run folder with a finished corpus. A kill waits until up to a quarter of all shards more are
    finished, and then for a random part of the time that two shards take: so it hits the same moments
    on a busy machine. `different` counts captures whose bytes are not those of the undisturbed run: it must be 0.
    """
    chance = random.Random(seed)
    whole = fresh_copy(base, scratch / "whole")
    seconds = _undisturbed(toy, whole)
    expected = cache_files(whole)
    shards = sum(name.endswith(".sig") for name in expected)
    kills, captures, different, kept = 0, 0, 0, []
    while kills < count:
        run_dir = fresh_copy(base, scratch / "killed")
        finished = False
        while not finished and kills < count:
            there = _kill_one(toy, run_dir, shards, seconds / shards, chance)
            finished = there is None
            if there is not None:
                kills += 1
                kept.append(there)
                note(f"kill {kills} of {count}: {there} of {shards} shards were finished")
        if not finished:
            toy.succeed(run_dir)
        captures += 1
        different += cache_files(run_dir) != expected or bool(list(run_dir.glob(".partial-*")))
        note(f"capture {captures}: {len(expected)} files compared, {different} captures differ so far")
    shutil.rmtree(scratch / "killed", ignore_errors=True)  # not there where no kill was asked for
    return {
        "kills": kills,
        "captures": captures,
        "different": different,
        "files": len(expected),
        "shards": shards,
        "finished_shards_at_kill": sorted(kept),
        "undisturbed_seconds": round(seconds, 2),
    }


def _undisturbed(toy: ToyRun, run_dir: Path) -> float:
    """Run to the end; seconds from the capture's first byte."""
    process = toy.start(run_dir)
    _wait_for_start(process, run_dir)
    started = time.monotonic()
    shown, said = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(shown + said)
    return time.monotonic() - started


def _kill_one(toy: ToyRun, run_dir: Path, shards: int, shard_seconds: float, chance: random.Random) -> int | None:
    """Start and kill; shards that were finished then, None where the run ended first."""
    process = toy.start(run_dir)
    _wait_for_start(process, run_dir)
    wanted = min(shards, _finished(run_dir) + chance.randint(0, shards // 4))
    while process.poll() is None and _finished(run_dir) < wanted:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 2 * shard_seconds))
    kill_all(process)
    return _finished(run_dir) if list(run_dir.glob(PARTIAL)) else None


def _finished(run_dir: Path) -> int:
    return len([record for out in run_dir.glob(PARTIAL) for record in out.glob("*-*.json")])


def _wait_for_start(process: Any, run_dir: Path) -> None:
    """Until the first bytes of this process' capture are on disk; what an earlier one left does not count."""
    begun, deadline = time.time(), time.monotonic() + START_SECONDS
    while process.poll() is None and not _written_since(run_dir, begun):
        if time.monotonic() > deadline:
            kill_all(process)
            raise RuntimeError("the teach stage never began")
        time.sleep(0.002)


def _written_since(run_dir: Path, begun: float) -> bool:
    for path in (file for out in run_dir.glob(PARTIAL) for file in out.glob(".*.tmp")):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > begun:
                return True
    return False
