"""What a grid costs, and how much of it quantized distillation wins back: one parent, its own teacher, held-out text.

    python benchmarks/quantize.py runs/lfm_small [--json] [--models student smollm] [--ways Q4_0 Q8_0 …]
        [--steps 50 200 500] [--minutes 10] [--plan] [--out benchmarks/results/quantize.json]

The parents are the student that a finished run of recipes/lfm_small.yaml distilled, and its teacher SmolLM2-135M; text
is that run's, more of it than the run had time for to train on, and what it held out to score. For each way: the parent
quantised afterwards (`ptq`), the same with an importance matrix (`ptq_imatrix`), where training on the grid begins, and
where it is after so many steps (of uniform grids and learned points few and small ones, to compare them with each
other), each count a training of its own (benchmarks/grids/trained.py). The parent runs beside the training, or is
captured once for all ways that do not ask it for its layers.
GGUF grids are measured as files in llama.cpp, others in transformers. `recovered` is 1 − KL(QAD) / KL(best PTQ) after
the most steps.

Every figure is kept in runs/quantize_benchmark as soon as it is there, and a training goes on from its last checkpoint:
`--minutes` ends a piece, the same command goes on. `--plan` says what is missing and about how long each piece takes:
about 355 minutes in all on two quiet cores with AVX2 (reckoned from operations).
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's arrays: read when the first is made

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grids import executorch
from grids.afterwards import untrained
from grids.parent import Deadline, Figures, OutOfTime, Parent, Piece, summary
from grids.text import check_heldout, training_corpus
from grids.trained import trainings
from grids.ways import LEARNED, WAYS, Way, best_ptq
from machine import hardware
from signals import TEACHER

from lmdistill.assets import model_folder
from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import SilentProgress

RESULT = Path(__file__).parent / "results" / "quantize.json"
MOST_STEPS, MOST_BESIDE = 500, 2000
ALL = [*WAYS, executorch.NAME]
TABLE = ("kl_ptq", "kl_ptq_imatrix", "kl_start")


def _pieces(parent: Parent, way: Way, steps: Sequence[int]) -> dict[str, Piece]:
    """All figures of one way and parent, in the order in which they need each other."""
    return {**parent.spoken(way), **untrained(parent, way), **trainings(parent, way, steps)}


def _one(parent: Parent, way: Way, steps: Sequence[int]) -> Figures:
    """Those figures, as the page has them."""
    parent.bound(way)
    made = {name: parent.kept(piece) for name, piece in _pieces(parent, way, steps).items()}
    return summary(made, steps, best_ptq(made))


def _table(result: Figures) -> str:
    lines = ["| model | way | KL PTQ | with imatrix | start | QAD | recovered |", "|---|---|---|---|---|---|---|"]
    for model, ways in result["by_model"].items():
        for name, one in ((name, one) for name, one in ways.items() if name != executorch.NAME):
            without = [f"{one[key]:.4f}" if key in one else "–" for key in TABLE]
            trained = ", ".join(f"{steps}: {kl:.4f}" for steps, kl in one["kl_qad"].items())
            lines.append(f"| {model} | {name} | {' | '.join(without)} | {trained} | {one['recovered']:.3f} |")
    return "\n".join(lines)


def _plan(parents: Sequence[Parent], arguments: argparse.Namespace) -> str:
    """What is missing, and about how long it takes."""
    lines, total = ["| model | piece | about |", "|---|---|---|"], 0.0
    for parent in parents:
        pieces: dict[str, Piece] = {}
        for name in arguments.ways:
            pieces |= {one.key: one for one in _of_way(parent, name, arguments).values()}
        for piece in parent.missing(list(pieces.values())):
            lines.append(f"| {parent.name} | {piece.key} | {piece.seconds:,.0f} s |")
            total += piece.seconds
    return "\n".join([*lines, f"| all | | {total / 60:,.0f} min on two quiet cores |"])


def _of_way(parent: Parent, name: str, arguments: argparse.Namespace) -> dict[str, Piece]:
    if name == executorch.NAME:
        return executorch.pieces(parent)
    return _pieces(parent, WAYS[name], _steps(name, arguments))


def _steps(way: str, arguments: argparse.Namespace) -> list[int]:
    steps: list[int] = arguments.learned_steps if way in LEARNED else arguments.steps
    return sorted(steps)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of recipes/lfm_small.yaml")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plan", action="store_true", help="say what is missing and how long it takes, and end")
    parser.add_argument("--models", nargs="*", choices=["student", "smollm"], default=["student", "smollm"])
    parser.add_argument("--ways", nargs="*", choices=ALL, default=ALL)
    parser.add_argument("--steps", nargs="*", type=int, default=[50, 200, 500], help="of shipped grids")
    parser.add_argument("--learned-steps", nargs="*", type=int, default=[50], help="of uniform grids and points")
    parser.add_argument("--heldout", type=int, default=4096, help="held-out tokens to score")
    parser.add_argument("--minutes", type=float, help="end this piece after so long")
    parser.add_argument("--work", type=Path, default=Path("runs/quantize_benchmark"), help="where figures are kept")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is written")
    return parser.parse_args()


def _parents(arguments: argparse.Namespace, deadline: Deadline) -> list[Parent]:
    """The models that are asked for."""

    def stage(name: str) -> Path:
        found = sorted(arguments.run.glob(f"[0-9]*-{name}-*/out"))
        if not found:
            sys.exit(f"{arguments.run} has no finished stage '{name}': run recipes/lfm_small.yaml first")
        return found[0]

    folders = {
        "student": lambda: stage("distill") / "model",
        "smollm": lambda: model_folder(TEACHER, SilentProgress()).path,
    }
    corpora = {}
    for length in sorted({way.row_tokens for way in WAYS.values()}):
        # Fewer steps read the same text; where nothing is captured, text costs nothing.
        most = {
            name: max(MOST_STEPS if way.cached else MOST_BESIDE, *_steps(name, arguments)) for name, way in WAYS.items()
        }
        rows = max(most[name] * way.rows for name, way in WAYS.items() if way.row_tokens == length)
        folder = arguments.work / f"corpus-{length}-{rows}"
        corpora[length] = training_corpus(arguments.run, folder, length, rows * length)
        check_heldout(corpora[length], stage("corpus"))
    return [
        Parent(name, folders[name](), corpora, stage("corpus"), arguments.work / name, arguments.heldout, deadline)
        for name in arguments.models
    ]


def _measure(parents: Sequence[Parent], arguments: argparse.Namespace, result: Figures) -> None:
    """Every way of every parent into `result`, which is written after each; OutOfTime where the time is up."""
    for name in arguments.ways:
        for parent in parents:
            if name == executorch.NAME:
                one = executorch.figures(parent)
            else:
                one = _one(parent, WAYS[name], _steps(name, arguments))
            result["by_model"].setdefault(parent.name, {})[name] = one
            result |= result["by_model"].get("student", {})
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _kept(before: Figures, parents: Sequence[Parent]) -> Figures:
    """What the file has of these very parents, whose digests go with their figures, and of models not asked for."""
    digests = before.get("parents", {}) | {parent.name: parent.digest for parent in parents}
    same = {name for name, digest in digests.items() if before.get("parents", {}).get(name) == digest}
    ways = {name: ways for name, ways in before.get("by_model", {}).items() if name in same}
    return {"parents": digests, "by_model": ways, **ways.get("student", {})}


def main() -> None:
    """Measure; what does not fit together is one message."""
    try:
        _run()
    except LmdistillError as error:
        sys.exit(error.render())


def _run() -> None:
    """Measure, write after every way, and print."""
    arguments = _arguments()
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result: Figures = {
        "command": f"python benchmarks/quantize.py {' '.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
    }
    complete = True
    with contextlib.redirect_stdout(sys.stderr):  # where trainers print; what is printed below stands alone
        parents = _parents(arguments, Deadline(arguments.minutes))
        plan = _plan(parents, arguments)
        print(plan)
        result |= _kept(before, parents)
        try:
            if not arguments.plan:
                _measure(parents, arguments, result)
        except OutOfTime:
            complete = False
    if arguments.plan:
        print(plan)
        return
    print(json.dumps(result | {"complete": complete}, indent=1) if arguments.json else _table(result))
    if not complete:
        print("not finished: the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
