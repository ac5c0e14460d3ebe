"""Students after equal distillation on text that neither search nor training saw: whose shape, and which start."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from grids.text import training_corpus

from lmdistill.corpus.format import CorpusReader
from lmdistill.evaluation.heldout import HeldOut, read_heldout
from lmdistill.evaluation.scorer import RowSums, paired_gap
from lmdistill.pipeline.stage import Runtime
from lmdistill.recommend.trial import score_model
from lmdistill.search import run
from lmdistill.search.record import supernet_file
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.run import Place, train
from searching.bench import Bench, extracted

MORE = 2  # times the run's tokens, in the corpus whose second half is text that the run never saw


def equal(bench: Bench) -> dict[str, Any]:
    """The searched student as the run distilled it, and the hand-made one by the run's keys and on the same rows."""
    searched = _student(bench, "searched", bench.searched.model().path, bench.distilled.model().path)
    hand_made = _student(bench, "hand_made", bench.hand.model().path)
    return _compared({"searched": searched, "hand_made": hand_made})


def starts(bench: Bench) -> dict[str, Any]:
    """The winner's shape from the super-network's weights, and as the run began it, after equal distillation.

    Where the run went on with inherited weights the two starts are nearly one: what its finalists learnt is between.
    """
    world, shape = run.begin(bench.context()), bench.searched_shape()
    tried = bench.found()["candidates"]
    where = next(one["sub_space"] for one in tried if one["digest"] == shape.digest)
    start = extracted(bench, world, shape, supernet_file(bench.searched.out, where), "shared")
    as_run = _student(bench, "searched", bench.searched.model().path, bench.distilled.model().path)
    return _compared({bench.config.weights: as_run, "shared": _student(bench, "shared", start)})


def fresh(bench: Bench) -> dict[str, Any]:
    """Both students of `equal` on documents for training that the run had no time for: nobody chose anything on those.

    Its recipe with more tokens has the same rows first and others behind them.
    """
    own = CorpusReader(bench.corpus.out)
    rows_RT, length = own.split("train").tokens_RT, own.meta.sequence_length
    folder = bench.args.store / "fresh-corpus"
    corpus = training_corpus(bench.args.run, folder, length, MORE * rows_RT.size)
    if (CorpusReader(corpus).split("train").tokens_RT[: len(rows_RT)] != rows_RT).any():
        raise SystemExit(f"the rows of {corpus} do not begin with those of {bench.corpus.out}: remove {folder}")
    behind = len(rows_RT) + 1  # a document may end in the row that follows
    heldout = _behind(read_heldout(corpus, "train", sys.maxsize), behind, bench.args.heldout // length)
    models = {"searched": bench.distilled.model().path, "hand_made": bench.args.store / "hand-made-distilled"}
    if not models["hand_made"].exists():
        raise SystemExit("the piece 'equal' comes first: it distils the hand-made student")
    found = {}
    for who, model in models.items():

        def make(model: Path = model) -> dict[str, Any]:
            rows, _ = score_model(model, heldout, Runtime().resolve_device())
            return {"rows": rows.to_json()}

        found[who] = bench.kept(f"fresh-{who}", make)
    return _compared(found)


def _behind(heldout: HeldOut, skip: int, rows: int) -> HeldOut:
    """At most so many rows behind the first `skip` ones."""
    rows = min(rows, heldout.rows - skip)
    kept = [replace(one, row=one.row - skip) for one in heldout.sequences if skip <= one.row < skip + rows]
    return replace(heldout, rows=rows, sequences=tuple(kept), bytes_R=heldout.bytes_R[skip : skip + rows])


def _student(bench: Bench, who: str, start: Path, distilled: Path | None = None) -> dict[str, Any]:
    """The loss of a student before and after distillation, which is done here where it has not been."""
    device = Runtime().resolve_device()
    heldout = read_heldout(bench.corpus.out, "test", bench.args.heldout)

    def before() -> dict[str, Any]:
        rows, _ = score_model(start, heldout, device)
        return {"start_nll": _mean(rows)}

    def after() -> dict[str, Any]:
        model = distilled or bench.args.store / f"{who}-distilled"
        if distilled is None:
            where = Place(start, model, bench.args.store / "scratch" / who, device, who)
            train(SignalsReader(bench.signals.out), bench.distilling, where, bench.context().progress)
        rows, _ = score_model(model, heldout, device)
        return {"tokens": bench.distilling.tokens, "rows": rows.to_json()}

    return bench.kept(f"start-{who}", before) | bench.kept(f"equal-{who}", after)


def _compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Two students with their losses, and the gap of the first to the second on the same predictions."""
    sums = {who: RowSums(**one.pop("rows")) for who, one in found.items()}
    for who, rows in sums.items():
        found[who]["nll"] = _mean(rows)
    first, second = sums.values()
    gap, error = paired_gap(first, second)
    return {**found, "gap": {"nll": round(gap, 5), "nll_se": round(error, 5), "predictions": sum(first.predictions)}}


def _mean(rows: RowSums) -> float:
    return round(sum(rows.sums["nll"]) / sum(rows.predictions), 5)
