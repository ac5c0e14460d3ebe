"""What a grid costs, and how much of it quantized distillation wins back: one parent, its own teacher, held-out text.

    python benchmarks/quantize.py runs/lfm_small [--json] [--models student smollm] [--ways Q4_0 Q8_0 …]
        [--steps 50 200 500] [--minutes 10] [--out benchmarks/results/quantize.json]

The parents are the student that a finished run of recipes/lfm_small.yaml distilled, and its teacher SmolLM2-135M; text
is that run's, all of it to train on and what it held out to score. For each way: the parent quantised afterwards
(`ptq`), the same with an importance matrix (`ptq_imatrix`), where training on the grid begins, and where it is after so
many steps of 1,024 tokens, each number of steps a training of its own with its own decay. GGUF grids are measured as
files in llama.cpp, others in transformers. `recovered` is 1 − KL(QAD) / KL(best PTQ) after the most steps.

Every figure is kept in runs/quantize_benchmark as soon as it is there, and a training goes on from its last checkpoint:
`--minutes` ends a piece, the same command goes on. About 40 minutes for 500 steps of one way and parent on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grids import executorch
from grids.text import check_heldout, whole_corpus
from grids.ways import IMATRIX_TOKENS, LEARNED, WAYS, Way, best_ptq
from machine import hardware
from signals import TEACHER

from lmdistill.assets import model_folder
from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import CorpusReader
from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.gguf_writer import write_gguf
from lmdistill.deployment.imatrix import importance_of
from lmdistill.deployment.packed_gguf import verify_packed, write_packed_gguf
from lmdistill.deployment.quantizer import quantize
from lmdistill.evaluation.heldout import HeldOut, read_heldout
from lmdistill.evaluation.references import Reference, ReferenceWriter
from lmdistill.evaluation.runtimes import RuntimeOptions, ScoringRuntime
from lmdistill.evaluation.runtimes.checkpoint import CheckpointRuntime
from lmdistill.evaluation.runtimes.llama_cpp import GgufRuntime
from lmdistill.evaluation.scorer import score, summarise
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.on_grid import kept_on_its_grids
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.size import sizes
from lmdistill.quantization.start import put_on_grids
from lmdistill.quantization.wanted import wanted
from lmdistill.training.config import DistillConfig
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.run import Place, train

RESULT = Path(__file__).parent / "results" / "quantize.json"
Figures = dict[str, Any]


class OutOfTime(Exception):
    """The piece is over; what is unfinished goes on in the next one."""


class Deadline(SilentProgress):
    """Progress that ends the piece when its time is up."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def update(self, done: float, total: float, unit: str = "", **figures: float | str) -> None:
        """Say how far it is, and stop where the time is up."""
        print(f"{done:,.0f} of {total:,.0f} {unit} {figures}", file=sys.stderr, flush=True)
        self.check()

    def check(self) -> None:
        """Raise OutOfTime where the time is up."""
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime


@dataclass
class Parent:
    """A model in full precision and what is measured against it."""

    name: str
    folder: Path
    corpus: Path
    work: Path
    tokens: int  # held-out ones to score
    deadline: Deadline

    @cached_property
    def heldout(self) -> HeldOut:
        """The text that is scored: on which no choice was made, where the corpus has such a split."""
        splits = CorpusReader(self.corpus).meta.splits
        return read_heldout(self.corpus, "test" if "test" in splits else "valid", self.tokens)

    def kept(self, key: str, make: Callable[[], Figures]) -> Figures:
        """A figure that is there already, or that `make` gives and that is there from now on."""
        path = self.work / f"{key}.json"
        if not path.exists():
            self.deadline.check()
            print(f"{self.name}: {key}", file=sys.stderr, flush=True)
            begin, figures = time.process_time(), make()
            figures["cpu_seconds"] = round(time.process_time() - begin, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(figures, indent=1))
            unfinished.replace(path)
        found: Figures = json.loads(path.read_text())
        return found

    def scored(self, runtime: ScoringRuntime) -> Figures:
        """KL to the parent and loss of what is open in `runtime`, which is closed."""
        try:
            reference = Reference(self.reference, self.heldout.predictions, self.heldout.vocab_size)
            figures = summarise(score(runtime, self.heldout, teacher=reference))
        finally:
            runtime.close()
        return {"kl": figures["kl_to_teacher"], "nll": figures["nll"], "nll_se": figures["nll_se"]}

    @property
    def options(self) -> RuntimeOptions:
        """One row at a time."""
        return RuntimeOptions(self.heldout.sequence_length)

    @cached_property
    def reference(self) -> Path:
        """The parent's own predictions."""
        path = self.work / "reference.f32"

        def measure() -> Figures:
            runtime = CheckpointRuntime.open(self.folder, self.options, exact=True)
            with ReferenceWriter(path) as writer:
                return summarise(score(runtime, self.heldout, keep=writer))

        self.work.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            (self.work / "parent.json").unlink(missing_ok=True)
        self.kept("parent", measure)
        return path

    @cached_property
    def training_text(self) -> list[list[int]]:
        """The first rows of the training split, for importance matrices."""
        rows = CorpusReader(self.corpus).split("train").tokens_RT
        return [[int(token) for token in row] for row in rows[: -(-IMATRIX_TOKENS // rows.shape[1])]]

    def file(self, way: Way, model: Path, name: str) -> Path:
        """Where a GGUF of a model is written, and removed once it is measured."""
        return self.work / f"{way.preset}-{name}-{model.name}.gguf"


def _ptq_file(parent: Parent, way: Way, imatrix: bool) -> Figures:
    """llama.cpp's own quantisation of the parent, as a file in llama.cpp."""
    base = parent.work / "base-F32.gguf"
    if not base.exists():
        write_gguf(parent.folder, base.with_suffix(".tmp"), "f32", name=parent.name, parent="0" * 64)
        base.with_suffix(".tmp").replace(base)
    importance = importance_of(parent.folder, parent.training_text) if imatrix else None
    target = parent.file(way, parent.folder, "imatrix" if imatrix else "plain")
    quantize(base, target, FORMATS[way.preset], importance=importance)
    figures = parent.scored(GgufRuntime.open(target, parent.options, exact=True))
    target.unlink()
    return figures


def _placed(parent: Parent, keys: QuantizeKeys) -> Any:
    """The parent where training on the grid begins."""
    import torch

    model = load_model(parent.folder)
    config = json.loads((parent.folder / "config.json").read_text())
    rows = (torch.tensor([row]) for row in parent.training_text)
    put_on_grids(model, keys, wanted(keys, config), rows)
    return model


def _ptq_model(parent: Parent, way: Way, keys: QuantizeKeys) -> Figures:
    """The parent on its grid without training, in transformers."""
    return parent.scored(CheckpointRuntime(_placed(parent, keys), "cpu"))


def _qad(parent: Parent, way: Way, steps: int) -> Figures:
    """The parent after so many steps on its grid, its own teacher."""
    folder = parent.work / f"{way.name}-{steps}"
    config = DistillConfig.model_validate({**way.training, "tokens": steps * way.step_tokens, "quantize": way.keys})
    place = Place(parent.folder, folder / "model", folder / "work", "cpu", parent.name)
    begin = time.process_time()
    record = train(CorpusRows(parent.corpus, "train"), config, place, parent.deadline)
    figures = _measured(parent, way, folder / "model")
    figures |= {"training_cpu_seconds": round(time.process_time() - begin, 1), "log": record["log"]}
    shutil.rmtree(folder)
    return figures


def _measured(parent: Parent, way: Way, model: Path) -> Figures:
    """KL and loss of a trained model, and whether its file has its very weights."""
    import torch
    from safetensors.torch import load_file

    placement = Placement.load(model)
    assert placement is not None
    tensors = load_file(model / "model.safetensors")
    if way.preset in FORMATS:
        target = parent.file(way, model, way.name)
        write_packed_gguf(model, target, placement, way.preset, name=way.name, parent="0" * 64)
        figures = {"bit_equal": True, "tensors": verify_packed(target, model), "bytes": target.stat().st_size}
        figures |= parent.scored(GgufRuntime.open(target, parent.options, exact=True))
        target.unlink()
    else:
        differing = [
            name
            for name, grid in placement.on_grids().items()
            if not torch.equal(
                grid.dequantise(grid.unpack(grid.pack(grid.quantise(tensors[name], placement.scales[name])))),
                tensors[name],
            )
        ]
        figures = {"bit_equal": not differing, "tensors": len(placement.on_grids())}
        loaded = load_model(model)
        kept_on_its_grids(loaded, model)  # where activations are rounded too, that is part of the grid
        figures |= parent.scored(CheckpointRuntime(loaded, "cpu"))
    return figures | {"size": sizes(tensors, placement)}


def _one(parent: Parent, way: Way, steps: list[int]) -> Figures:
    """All figures of one way and parent that are there, made in order of their cost."""
    _ = parent.reference
    if way.preset in FORMATS:
        parts = {
            "ptq": lambda: _ptq_file(parent, way, imatrix=False),
            "ptq_imatrix": lambda: _ptq_file(parent, way, imatrix=True),
        }
    else:
        parts = {name: lambda keys=keys: _ptq_model(parent, way, keys) for name, keys in way.untrained.items()}
    parts["start"] = lambda: _ptq_model(parent, way, way.quantize)
    made = {name: parent.kept(f"{way.name}-{name}", make) for name, make in parts.items()}
    for count in steps:
        made[str(count)] = parent.kept(f"{way.name}-qad-{count}", lambda count=count: _qad(parent, way, count))
    return _summary(made, steps)


def _summary(made: dict[str, Figures], steps: list[int]) -> Figures:
    """The figures as the page has them."""
    last = made[str(steps[-1])]
    kinds = [kind for kind in ("ptq", "ptq_imatrix", "start") if kind in made]
    best = best_ptq(made)
    return {
        "bit_equal": all(made[str(count)]["bit_equal"] for count in steps),
        "tensors": last["tensors"],
        **{f"kl_{kind}": made[kind]["kl"] for kind in kinds},
        "kl_qad": {str(count): made[str(count)]["kl"] for count in steps},
        "nll": {kind: made[kind]["nll"] for kind in kinds} | {f"qad_{n}": made[str(n)]["nll"] for n in steps},
        "recovered": round(1 - last["kl"] / best, 4),
        "recovered_by_steps": {str(count): round(1 - made[str(count)]["kl"] / best, 4) for count in steps},
        "size": last["size"],
        "training_cpu_seconds": {str(count): made[str(count)]["training_cpu_seconds"] for count in steps},
    }


def _table(result: Figures) -> str:
    lines = ["| model | way | KL PTQ | with imatrix | start | QAD | recovered |", "|---|---|---|---|---|---|---|"]
    for model, ways in result["by_model"].items():
        for name, one in ways.items():
            untrained = [f"{one[key]:.4f}" if key in one else "–" for key in ("kl_ptq", "kl_ptq_imatrix", "kl_start")]
            trained = ", ".join(f"{steps}: {kl:.4f}" for steps, kl in one["kl_qad"].items())
            lines.append(f"| {model} | {name} | {' | '.join(untrained)} | {trained} | {one['recovered']:.3f} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of recipes/lfm_small.yaml")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--models", nargs="*", choices=["student", "smollm"], default=["student", "smollm"])
    parser.add_argument("--ways", nargs="*", choices=[*WAYS, executorch.NAME], default=list(WAYS))
    parser.add_argument("--steps", nargs="*", type=int, default=[50, 200, 500], help="of shipped grids")
    parser.add_argument("--learned-steps", nargs="*", type=int, default=[50, 200], help="of uniform grids and points")
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
    corpus = whole_corpus(arguments.run, arguments.work)
    check_heldout(corpus, stage("corpus"))
    return [
        Parent(name, folders[name](), corpus, arguments.work / name, arguments.heldout, deadline)
        for name in arguments.models
    ]


def _measure(arguments: argparse.Namespace, result: Figures) -> None:
    """Every way of every parent into `result`, which is written after each; OutOfTime where the time is up."""
    for parent in _parents(arguments, Deadline(arguments.minutes)):
        for name in arguments.ways:
            if name == executorch.NAME:
                result[name] = executorch.joined(result.get(name, {}), parent)
            else:
                steps = arguments.learned_steps if name in LEARNED else arguments.steps
                result["by_model"].setdefault(parent.name, {})[name] = _one(parent, WAYS[name], steps)
            result |= result["by_model"].get("student", {})
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, write after every way, and print."""
    arguments = _arguments()
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result: Figures = {
        "command": f"python benchmarks/quantize.py {' '.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "by_model": before.get("by_model", {}),
        **({"executorch": before["executorch"]} if "executorch" in before else {}),
    }
    complete = True
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where trainers print; what is printed below stands alone
            _measure(arguments, result)
    except OutOfTime:
        complete = False
    print(json.dumps(result | {"complete": complete}, indent=1) if arguments.json else _table(result))
    if not complete:
        print("not finished: the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
