"""Who is timed before the choice: what the timed ones missed by tells which of the others is worth a timing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmdistill.search.candidate import Candidate, Layer
from lmdistill.search.scored import RANKED, Scored
from lmdistill.search.shortlist import shortlist

BUDGET = "decode >= 1x teacher"


def candidate(depth: int) -> Candidate:
    return Candidate("llama", tuple(Layer(block, "attention") for block in range(depth)), 64, 96, 4, 2, 16, 3, 64)


def devices(foretold: dict[int, float], truly: dict[int, float], asked: list[list[int]]) -> Any:
    """A device whose excess by depth is foretold, and found when it is timed."""

    def timed(some: Sequence[Candidate], work: Path) -> dict[str, dict[str, float]]:
        asked.append([one.depth for one in some])
        return {one.shape_digest: {"excess": truly[one.depth]} for one in some}

    return SimpleNamespace(
        timed=timed,
        excess=lambda one: {BUDGET: foretold[one.depth]},
        judged=lambda one, figures: {BUDGET: figures["excess"]},
    )


def scored(depth: int, loss: float) -> Scored:
    one = candidate(depth)
    return Scored(one, {RANKED: loss, "ce": loss}, {"decode_ms": float(depth)}, {BUDGET: -0.01})


def best_of(
    foretold: dict[int, float], truly: dict[int, float], count: int = 1
) -> tuple[list[int], list[list[int]], Any]:
    asked: list[list[int]] = []
    everyone = [scored(depth, 10.0 - depth) for depth in foretold]
    told: list[str] = []
    found = shortlist(everyone, ["decode_ms"], count, devices(foretold, truly, asked), Path(), told.append)
    return [one.candidate.depth for one in found.best], asked, told


def test_after_one_miss_those_that_would_miss_alike_are_not_timed() -> None:
    """Twelve deeper ones are foretold within the budget by less than the model is wrong: the thirteenth is next."""
    foretold = {depth: -0.001 * (20 - depth) for depth in range(7, 20)} | {6: -0.1}
    truly = {depth: excess + 0.03 for depth, excess in foretold.items()}
    best, asked, told = best_of(foretold, truly)
    assert best == [6] and asked == [[19], [6]]
    assert len(told) == 1 and told[0].startswith("set aside: 19 layers")


def test_where_the_model_is_right_the_lowest_loss_wins() -> None:
    foretold = dict.fromkeys((3, 4, 5), -0.01)
    best, asked, told = best_of(foretold, foretold)
    assert (best, asked, told) == ([5], [[5]], [])


def test_where_too_few_are_hopeful_the_others_are_timed_too() -> None:
    foretold = {3: -0.2, 4: -0.01, 5: -0.01}
    truly = {3: -0.2, 4: -0.01, 5: 0.05}
    best, asked, _ = best_of(foretold, truly, count=2)
    assert best == [4, 3] and asked[0] == [5, 4]
