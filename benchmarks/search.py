"""Searching against not searching, on the embedded teacher: every claim of the search stage, in pieces that are kept.

    python benchmarks/search.py runs/lfm_search [--json] [--random 8] [--short 8] [--minutes 60]

The searched student, all candidates and the device's timings are those of a finished run of recipes/lfm_search.yaml.
Beside them stands a student made by hand: grown by the `student` stage of recipes/lfm_qad.yaml, whose shape a person
chose for this teacher and machine. The pieces, in order:
- search: what was searched and found; the hand-made student by the latency model;
- random: so many random candidates that keep the budgets as foretold, each trained from the teacher's weights, all
  together on as many tokens as the super-network's candidates were, for the hypervolume of either;
- ranked: the same with random shapes on the blocks of the search's own ranking, which random search has to do without;
- short: candidates from all over the search, each with a short distillation, for the rank correlation of the loss of
  inherited weights with that after it;
- equal: the searched student as the run distilled it, the hand-made one distilled by the same keys on the same rows,
  and both scored on text that neither search nor training saw;
- fresh: both again, on documents of the same kind that the run was never trained on nor looked at by;
- starts: the searched shape once more, from the super-network's weights instead of those that the run began it with;
- device: both shapes timed in turns as Q4_0 files.
What is done is kept below --store. Stopped, or after --minutes, the same command goes on; figures of all that is there
are written to benchmarks/results/search.json (null where a piece is missing). About forty minutes on two quiet cores
with the growth of the hand-made student.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import hardware
from searching.bench import bind

RESULTS = Path(__file__).parent / "results"
RESULT, LATENCY = RESULTS / "search.json", RESULTS / "search_latency.json"
PIECES = ("search", "random", "ranked", "short", "equal", "fresh", "starts", "device")


def main() -> None:
    """Make the pieces that are missing, each in a process that may be stopped; write what is there."""
    args = parsed()
    if args.piece:
        make_piece(args)
        return
    begun, deadline = hardware(), time.monotonic() + 60 * args.minutes
    args.store.mkdir(parents=True, exist_ok=True)
    if args.minutes > 0 or any((args.store / f"{piece}.json").exists() for piece in PIECES):
        bind(args)
    for piece in PIECES:
        if not (args.store / f"{piece}.json").exists() and (left := deadline - time.monotonic()) > 1:
            command = [sys.executable, __file__, *sys.argv[1:], "--piece", piece]
            try:
                subprocess.run(command, check=True, timeout=left, stdout=sys.stderr)
            except subprocess.TimeoutExpired:
                print(f"stopped in '{piece}': the same command goes on", file=sys.stderr)
    result = figures(args.store)
    result["measured"] |= {
        "command": " ".join(["python benchmarks/search.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": begun,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


def figures(store: Path) -> dict[str, Any]:
    """The result, of the pieces that are there."""
    found = {piece: json.loads(path.read_text()) for piece in PIECES if (path := store / f"{piece}.json").exists()}
    timing = json.loads(LATENCY.read_text()) if LATENCY.exists() else {}
    equal, device = found.get("equal", {}), found.get("device", {})
    latency = {name: timing.get(name) for name in ("held_out", "spearman", "median_rel_error")}
    students = {who: {**equal.get(who, {}), **device.get(who, {})} or None for who in ("searched", "hand_made")}
    return {
        "latency": latency,
        "hypervolume_ratio": found.get("random", {}).get("ratio"),
        "rank_correlation": found.get("short", {}).get("spearman"),
        **students,
        "measured": found,
    }


def make_piece(args: argparse.Namespace) -> None:
    """Make one piece and keep it."""
    from searching.pieces import MAKERS, Bench

    result = MAKERS[args.piece](Bench.of(args))
    partial = args.store / f"{args.piece}.tmp"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(args.store / f"{args.piece}.json")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("run", type=Path, help="the folder of a finished run of recipes/lfm_search.yaml")
    parser.add_argument("--short-tokens", type=int, default=8_192, help="of each short distillation")
    parser.add_argument("--short", type=int, default=8, help="candidates that get one")
    parser.add_argument("--random", type=int, default=8, help="random candidates")
    parser.add_argument("--heldout", type=int, default=12_288, help="held-out tokens to score")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many minutes")
    parser.add_argument("--store", type=Path, default=Path("runs/search_benchmark"), help="where pieces are kept")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
