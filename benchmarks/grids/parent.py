"""One parent of benchmarks/quantize.py with the figures that are there, and pieces of work that end in time.

`python benchmarks/quantize.py --minutes 10` ends a piece after ten minutes; the same command goes on.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grids.text import captured
from grids.ways import CACHE, CAPTURING, FLOPS, IMATRIX_TOKENS, Way
from lmdistill.corpus.format import CorpusReader
from lmdistill.evaluation.heldout import HeldOut, read_heldout
from lmdistill.evaluation.references import Reference, ReferenceWriter
from lmdistill.evaluation.runtimes import RuntimeOptions, ScoringRuntime
from lmdistill.evaluation.runtimes.checkpoint import CheckpointRuntime
from lmdistill.evaluation.scorer import score, summarise
from lmdistill.pipeline.files import sha256_file
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.run import Reader, bind

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


@dataclass(frozen=True)
class Piece:
    """One figure: where it is kept, how it is made, and about how long that takes on two quiet cores."""

    key: str
    make: Callable[[], Figures]
    seconds: float
    done: Callable[[], object] = lambda: None  # once it is kept


@dataclass
class Parent:
    """A model in full precision and what is measured against it."""

    name: str
    folder: Path
    corpora: Mapping[int, Path]  # text to train on, by the length of its rows
    scored_corpus: Path  # whose held-out text is scored
    work: Path
    tokens: int  # held-out ones to score
    deadline: Deadline

    def __post_init__(self) -> None:
        """Bind the figures to this model and text; IntegrityError where they are of others."""
        text = {str(length): CorpusReader(corpus).digest("train") for length, corpus in self.corpora.items()}
        bind(self.work, {"model": self.digest, "text": text, "heldout": self.split})

    @cached_property
    def digest(self) -> str:
        """Of all its weights."""
        return " ".join(sha256_file(path) for path in sorted(self.folder.glob("*.safetensors")))

    @cached_property
    def split(self) -> str:
        """Digest and size of the text that is scored."""
        return f"{CorpusReader(self.scored_corpus).digest(self.heldout.split)} {self.tokens}"

    @cached_property
    def heldout(self) -> HeldOut:
        """The text that is scored: on which no choice was made, where the corpus has such a split."""
        splits = CorpusReader(self.scored_corpus).meta.splits
        return read_heldout(self.scored_corpus, "test" if "test" in splits else "valid", self.tokens)

    @cached_property
    def weights(self) -> int:
        """How many it has."""
        from lmdistill.checkpoints import stored_tensors

        return sum(math.prod(shape) for _, shape in stored_tensors(self.folder))

    def bound(self, way: Way) -> None:
        """Bind a way's figures to what the way is."""
        step = {"rows": way.rows, "row_tokens": way.row_tokens}
        bind(self.work / way.name, {"keys": way.keys, "training": way.training, **step})

    def missing(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Those whose figures are not there."""
        return [piece for piece in pieces if not self._path(piece.key).exists()]

    def kept(self, piece: Piece) -> Figures:
        """A figure that is there already, or that is made and there from now on."""
        path = self._path(piece.key)
        if not path.exists():
            self.deadline.check()
            print(f"{self.name}: {piece.key}, about {piece.seconds:,.0f} s", file=sys.stderr, flush=True)
            begin, cpu, figures = time.monotonic(), time.process_time(), piece.make()
            figures["seconds"] = round(time.monotonic() - begin, 1)
            figures["cpu_seconds"] = round(time.process_time() - cpu, 1)
            figures["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(figures, indent=1))
            unfinished.replace(path)
            piece.done()
        found: Figures = json.loads(path.read_text())
        return found

    def _path(self, key: str) -> Path:
        return self.work / f"{key}.json"

    def scored(self, runtime: ScoringRuntime) -> Figures:
        """KL to the parent and loss of what is open in `runtime`, which is closed."""
        try:
            reference = Reference(self.reference, self.heldout.predictions, self.heldout.vocab_size)
            figures = summarise(score(runtime, self.heldout, teacher=reference))
        finally:
            runtime.close()
        return {
            "kl": figures["kl_to_teacher"],
            "kl_se": figures["kl_to_teacher_se"],
            "nll": figures["nll"],
            "nll_se": figures["nll_se"],
        }

    @property
    def options(self) -> RuntimeOptions:
        """One row at a time."""
        return RuntimeOptions(self.heldout.sequence_length)

    @property
    def reference(self) -> Path:
        """The parent's own predictions of what is scored."""
        return self.work / "reference.f32"

    def reader(self, way: Way) -> Reader:
        """What is trained on, in rows as the way takes them."""
        if way.cached:
            return SignalsReader(self._signals(way) / "out", "train")
        return CorpusRows(self.corpora[way.row_tokens], "train")

    def _signals(self, way: Way) -> Path:
        return self.work / f"signals-{way.row_tokens}"

    def spoken(self, way: Way) -> dict[str, Piece]:
        """The parent's predictions, as pieces of work: of what is scored, and for some ways of what is trained on."""
        model, corpus = ModelRef(self.name, self.folder, self.digest), self.corpora[way.row_tokens]
        text = CorpusReader(corpus).meta.splits["train"].tokens

        def capture() -> Figures:
            captured(corpus, model, CACHE, self._signals(way), self.deadline)
            return {"tokens": text}

        if not way.cached:
            return {"parent": self.alone}
        seconds = CAPTURING * self.forward_seconds(text)
        return {"parent": self.alone, "capture": Piece(f"capture-{way.row_tokens}", capture, seconds)}

    @property
    def alone(self) -> Piece:
        """Its own loss, and its predictions of what is scored, which all others are held against."""

        def measure() -> Figures:
            runtime = CheckpointRuntime.open(self.folder, self.options, exact=True)
            with ReferenceWriter(self.reference) as writer:
                return summarise(score(runtime, self.heldout, keep=writer))

        return Piece("parent", measure, self.forward_seconds(self.tokens))

    def forward_seconds(self, tokens: int) -> float:
        """About how long a forward pass takes on two cores."""
        return 2 * self.weights * tokens / FLOPS

    @cached_property
    def training_text(self) -> list[list[int]]:
        """The first of the longest rows of the training split, for importance matrices."""
        rows = CorpusReader(self.corpora[max(self.corpora)]).split("train").tokens_RT
        return [[int(token) for token in row] for row in rows[: -(-IMATRIX_TOKENS // rows.shape[1])]]

    def file(self, way: Way, name: str) -> Path:
        """Where a GGUF of it is written, and removed once it is measured."""
        return self.work / way.name / f"{name}.gguf"


def summary(made: Mapping[str, Figures], steps: Sequence[int], best: float) -> Figures:
    """The figures of one way as the page has them."""
    last = made[str(steps[-1])]
    kinds = [kind for kind in ("ptq", "ptq_imatrix", "start") if kind in made]
    return {
        "bit_equal": all(made[str(count)]["bit_equal"] for count in steps),
        "tensors": last["tensors"],
        **{f"kl_{kind}": made[kind]["kl"] for kind in kinds},
        "kl_se": {kind: made[kind]["kl_se"] for kind in (*kinds, *map(str, steps))},
        "kl_qad": {str(count): made[str(count)]["kl"] for count in steps},
        "nll": {kind: made[kind]["nll"] for kind in ("parent", *kinds)}
        | {f"qad_{count}": made[str(count)]["nll"] for count in steps},
        "step_tokens": last["step_tokens"],
        "recovered": round(1 - last["kl"] / best, 4),
        "recovered_from_start": round(1 - last["kl"] / made["start"]["kl"], 4),  # by the steps alone
        "recovered_by_steps": {str(count): round(1 - made[str(count)]["kl"] / best, 4) for count in steps},
        "size": last["size"],
        "finished": last["finished"],
        "seconds": {name: figures["seconds"] for name, figures in made.items()},
    }
