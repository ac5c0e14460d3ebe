"""Proofs that a teacher cache survives: flipped bytes are found, kill -9 and full disks change no byte of the result.

    python benchmarks/robustness.py [--json] [--flips 1000] [--kills 50] [--variants mmap …] [--parts flips kills disk]
                                    [--jobs 2]

A toy teacher and the real pipeline, in processes of their own. Every count below must come out whole: what went wrong
is listed in the result, also written to benchmarks/results/robustness.json. Exit status 1 where anything did.
About ten minutes of two idle cores, most of it the pipeline's starts after each kill: a kill waits for finished shards,
not for seconds, so that several proofs can go on at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from machine import hardware
from robust import flips, full_disk, kills, toy_run

from lmdistill.signals import variant as variants

RESULT = Path(__file__).parent / "results" / "robustness.json"
PARTS = ("flips", "kills", "disk")
FLIPPED_ROWS, KILLED_ROWS = 384, 1536  # of 64 tokens, to train on: the second makes a capture of some seconds
FLIPPED_SHARD_ROWS, KILLED_SHARD_ROWS = 64, 16


@dataclass(frozen=True)
class Task:
    """Proofs of one variant that share a run."""

    variant: str
    parts: tuple[str, ...]
    flips: int
    kills: int
    rows: int
    seed: int


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """Flips apart from the rest, the longest first; the variants share the kills."""
    found, shared = list[Task](), len(arguments.variants)
    for chosen in ({"kills", "disk"}, {"flips"}):
        parts = tuple(part for part in arguments.parts if part in chosen)
        for index, variant in enumerate(arguments.variants):
            kill_count = len(range(index, arguments.kills, shared))
            seed = arguments.seed + index  # other places and moments for each
            found.append(Task(variant, parts, arguments.flips, kill_count, arguments.rows, seed))
    return [task for task in found if task.parts]


def prove(task: Task) -> dict[str, Any]:
    """All proofs of a task, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="robustness-"))
    try:
        return _flipped(task, folder) if "flips" in task.parts else _stopped(task, folder)
    finally:
        shutil.rmtree(folder)


def _flipped(task: Task, folder: Path) -> dict[str, Any]:
    toy = toy_run.make(folder / "toy", task.variant, FLIPPED_ROWS, FLIPPED_SHARD_ROWS)
    hidden = [] if task.variant == "sampled" else ["--set", "stages.teach.hidden_layers=[-1]"]
    toy.succeed(folder / "run", *hidden)  # so that it has every kind of file
    (cache,) = (folder / "run").glob("*-teach-*/out")
    return {"flips": flips.flip_many(cache, task.flips, task.seed)}


def _stopped(task: Task, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    toy = toy_run.make(folder / "toy", task.variant, task.rows, KILLED_SHARD_ROWS)
    base = folder / "base"
    toy.succeed(base, "--until", "corpus")
    if "kills" in task.parts:
        note = partial(_note, task.variant)
        found["kills"] = kills.kill_many(toy, base, folder, task.kills, task.seed, note)
    else:
        toy.succeed(toy_run.fresh_copy(base, folder / "whole"))
    if "disk" in task.parts:
        expected = toy_run.cache_files(folder / "whole")
        found["tmpfs"] = full_disk.fill_tmpfs(toy, base, expected, folder)
        found["file_size_limit"] = full_disk.limit_file_size(toy, base, expected, folder)
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words."""
    wrong = []
    flipped = found.get("flips", {})
    wrong += [f"flips {name}: {flipped[name]}" for name in ("missed", "unlocated", "read_anyway") if flipped.get(name)]
    if found.get("kills", {}).get("different"):
        wrong.append(f"kills: {found['kills']['different']} captures came out with other bytes")
    for name in ("tmpfs", "file_size_limit"):
        disk = found.get(name, {})
        if disk and "skipped" not in disk:
            good = disk["exit_status"] == 2 and not disk["traceback"] and disk["message"] and disk["same_bytes"]
            good = good and disk.get("before_work", disk)["exit_status"] == 2
            wrong += [] if good else [f"{name}: {disk}"]
    return wrong


def _note(variant: str, text: str) -> None:
    print(f"{variant}: {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--flips", type=int, default=1000, help="single-byte flips of each variant's cache")
    parser.add_argument("--kills", type=int, default=50, help="kill -9 during captures, all variants together")
    parser.add_argument("--rows", type=int, default=KILLED_ROWS, help="rows of the captures that are killed")
    parser.add_argument("--variants", nargs="+", default=list(variants.names()), choices=variants.names())
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="proofs that go on at once")
    parser.add_argument("--seed", type=int, default=0, help="of the random places and moments")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is kept")
    return parser.parse_args()


def main() -> int:
    """Prove, print, keep; 1 where a proof failed."""
    arguments, load, started = _arguments(), hardware(), time.monotonic()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/robustness.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": load,
        "variants": {variant: {} for variant in arguments.variants},
    }
    tasks, apart = tasks_of(arguments), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, apart) as pool:
        for task, found in zip(tasks, pool.map(prove, tasks), strict=True):
            result["variants"][task.variant] |= found
    result["seconds"] = round(time.monotonic() - started)
    result["faults"] = {name: wrong for name, found in result["variants"].items() if (wrong := faults(found))}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=1))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
