"""Proofs that a teacher cache survives: flipped bytes are found, kill -9 and full disks change no byte of the result.

    python benchmarks/robustness.py [--json] [--flips 1000] [--kills 50] [--variants mmap …] [--parts flips kills disk]

A toy teacher and the real pipeline, in processes of their own. Every count below must come out whole: what went wrong
is listed in the result, also written to benchmarks/results/robustness.json. Exit status 1 where anything did.
About a quarter of an hour of one idle core, most of it starts of the pipeline after a kill.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import hardware
from robust import flips, full_disk, kills, toy_run

from lmdistill.signals import variant as variants

RESULT = Path(__file__).parent / "results" / "robustness.json"
PARTS = ("flips", "kills", "disk")
FLIPPED_ROWS, KILLED_ROWS = 384, 1536  # of 64 tokens, to train on: the second makes a capture of some seconds
FLIPPED_SHARD_ROWS, KILLED_SHARD_ROWS = 64, 16


def prove(variant: str, arguments: argparse.Namespace, folder: Path, kill_count: int) -> dict[str, Any]:
    """All asked proofs for one variant."""
    found: dict[str, Any] = {}
    if "flips" in arguments.parts:
        toy = toy_run.make(folder / "flips", variant, FLIPPED_ROWS, FLIPPED_SHARD_ROWS)
        toy.succeed(folder / "flipped", "--set", "stages.teach.hidden_layers=[-1]")  # so that it has every kind of file
        (cache,) = (folder / "flipped").glob("*-teach-*/out")
        found["flips"] = flips.flip_many(cache, arguments.flips, arguments.seed)
    if {"kills", "disk"} & set(arguments.parts):
        toy = toy_run.make(folder / "toy", variant, arguments.rows, KILLED_SHARD_ROWS)
        base = folder / "base"
        toy.succeed(base, "--until", "corpus")
        if "kills" in arguments.parts:
            found["kills"] = kills.kill_many(toy, base, folder, kill_count, arguments.seed, _note)
        else:
            toy.succeed(toy_run.fresh_copy(base, folder / "whole"))
        if "disk" in arguments.parts:
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


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--flips", type=int, default=1000, help="single-byte flips of each variant's cache")
    parser.add_argument("--kills", type=int, default=50, help="kill -9 during captures, all variants together")
    parser.add_argument("--rows", type=int, default=KILLED_ROWS, help="rows of the captures that are killed")
    parser.add_argument("--variants", nargs="+", default=list(variants.names()), choices=variants.names())
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="of the random places and moments")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is kept")
    return parser.parse_args()


def main() -> int:
    """Prove, print, keep; 1 where a proof failed."""
    arguments, load = _arguments(), hardware()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/robustness.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": load,
        "variants": {},
    }
    for index, variant in enumerate(arguments.variants):
        kill_count = len(range(index, arguments.kills, len(arguments.variants)))
        folder = Path(tempfile.mkdtemp(prefix="robustness-"))
        try:
            result["variants"][variant] = prove(variant, arguments, folder, kill_count)
        finally:
            shutil.rmtree(folder)
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
