"""The pieces of benchmarks/search.py on a toy search: candidates that they train start as they did in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from searching import pieces
from searching.bench import Bench
from searching.students import _behind
from supernet_toys import KEYS

from lmdistill.evaluation.heldout import HeldOut, ScoredSequence
from lmdistill.pipeline.stage import Artefact, ModelRef, StageContext
from lmdistill.search.scored import RANKED
from lmdistill.stages.search import SearchStage


@pytest.fixture(scope="module")
def bench(
    context: Callable[..., StageContext[Any]],
    corpus: Artefact,
    signals: Artefact,
    teacher: ModelRef,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    """Of a search that kept its shared weights; its own winner stands for the student made by hand."""
    folder = tmp_path_factory.mktemp("searched")
    ctx = context(folder, supernet=KEYS["supernet"] | {"keep": True}, budgets=["decode >= 1.3x teacher"])
    SearchStage().run(ctx)
    searched = Artefact("search", "search", "student", "s" * 64, folder)
    recipe: Any = SimpleNamespace(entry=lambda name: SimpleNamespace(config=ctx.config))
    args = argparse.Namespace(store=folder / "store", random=3, short=4, short_tokens=96)
    return Bench(args, recipe, corpus, signals, searched, searched, searched, teacher)


def test_a_student_is_read_as_the_candidate_that_it_was(bench: Bench) -> None:
    found = pieces.search(bench)
    assert found["hand_made"]["candidate"] == found["candidate"]
    (winner,) = (one for one in bench.found()["candidates"] if one["digest"] == found["winner"])
    assert found["hand_made"]["predicted"] == winner["predicted"]


def test_random_candidates_keep_the_budgets_and_share_the_searchs_tokens(bench: Bench) -> None:
    found, teacher = pieces.random_search(bench), bench.found()["teacher"]
    budget = KEYS["supernet"]["tokens"] * (2 + bench.config.supernet.random_candidates)
    assert found["tokens"] == {"all": budget, "each": budget // 3}
    assert len(found["random"]) == 3 and found["ratio"] > 0
    assert all(decode_ms <= teacher["decode_ms"] / 1.3 * 1.001 for _, decode_ms in found["random"])


def test_ranked_candidates_are_random_shapes_on_the_searchs_own_blocks(bench: Bench) -> None:
    found = pieces.ranked_search(bench)
    assert len(found["random"]) == 3 and found["tokens"] == pieces.random_search(bench)["tokens"]
    world = pieces.run.begin(bench.context())
    drawn = pieces._drawn(
        world,
        0,
        3,
        lambda world, rng: world.ranking.candidate(pieces.shape_of(world.subs[0].sample(rng)), world.subs[0].space),
    )
    assert len({one.digest for one in drawn}) == 3
    assert all(one == world.ranking.candidate(pieces.shape_of(one), world.subs[0].space) for one in drawn)


def test_rows_behind_a_corpus_are_others(bench: Bench) -> None:
    sequences = tuple(ScoredSequence(row, np.arange(4) + row, np.arange(3)) for row in range(5))
    heldout = HeldOut("test", 5, 4, 64, sequences, np.arange(5))
    kept = _behind(heldout, 2, 9)
    assert (kept.rows, [one.row for one in kept.sequences], kept.bytes_R.tolist()) == (3, [0, 1, 2], [2, 3, 4])
    assert kept.sequences[0].tokens_T[0] == 2 and _behind(heldout, 2, 1).rows == 1


def test_candidates_start_with_the_loss_that_the_search_saw(bench: Bench) -> None:
    """Cut anew from the kept weights: without a step of training the losses of the record come back."""
    found = pieces.short(bench)
    inherited, after = zip(*found["inherited_and_after"], strict=True)
    assert list(inherited) == sorted(inherited) and len(inherited) == 4
    assert all(one != other for one, other in zip(inherited, after, strict=True))
    heldout = pieces.run.begin(bench.context()).heldout
    by_loss = {one["loss"][RANKED]: one["digest"] for one in bench.found()["candidates"]}
    for loss in inherited:
        folder = Path(bench.args.store) / "scratch" / f"short-{by_loss[loss][:16]}-start"
        assert heldout.of_folder(folder)[RANKED] == pytest.approx(loss, abs=2e-6)
