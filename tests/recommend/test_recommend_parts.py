"""Budgets, the search and the choice of a winner, without any model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import LmdistillError, StageError
from lmdistill.recommend.recipe_text import _plain
from lmdistill.recommend.request import parse_budget
from lmdistill.recommend.sweep import Outcome, Params, Sweep, winner

DEPTHS = (4, 8)
FIXED: list[Params] = [
    {"loss": "decoupled_topk", "layers": 8, "kd_weight": 0.5, "temperature": 1.0},
    {"loss": "ce", "layers": 8},
]


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [("90s", 90, None), ("10m", 600, None), ("2h", 7200, None), ("1.5ktok", None, 1500), ("2Mtok", None, 2_000_000)],
)
def test_a_budget_is_time_or_tokens(text: str, seconds: float | None, tokens: int | None) -> None:
    budget = parse_budget(text)
    assert (budget.seconds, budget.tokens) == (seconds, tokens)


@pytest.mark.parametrize("text", ["10", "0m", "fast", "-5m", "10 parsecs", ""])
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(LmdistillError, match="is no budget"):
        parse_budget(text)


def answer(params: Params) -> Outcome:
    """A loss with one best point: decoupled, λ = 0.7, τ = 2, 8 layers."""
    loss = 3.0 if params["loss"] == "decoupled_topk" else 3.5
    loss += abs(params.get("kd_weight", 0.0) - 0.7) + 0.2 * (params.get("temperature") != 2.0)
    loss += 0.4 * (params["layers"] == 4)
    return Outcome(params, 100, 1000 * params["layers"], [loss * 10, loss * 10], [10, 10])


def test_a_sweep_in_pieces_is_the_sweep_at_once_and_tries_nothing_twice(tmp_path: Path) -> None:
    said: list[int] = []
    again: list[int] = []
    whole = Sweep(tmp_path / "whole", "s", 7, DEPTHS).run(FIXED, 14, answer, lambda number, _: said.append(number))
    for trials in (1, 3, 9, 14):
        tell = lambda number, _: again.append(number)  # noqa: E731
        pieces = Sweep(tmp_path / "pieces", "s", 7, DEPTHS).run(FIXED, trials, answer, tell)
    assert pieces == whole
    assert said == again == list(range(14))
    assert [one.params for one in whole[:2]] == FIXED
    assert len({str(sorted(one.params.items())) for one in whole}) == 14


def test_another_seed_is_another_sweep_and_another_identity_begins_anew(tmp_path: Path) -> None:
    def run(identity: str, seed: int) -> list[Params]:
        outcomes = Sweep(tmp_path / "journal", identity, seed, DEPTHS).run(FIXED, 8, answer, lambda *_: None)
        return [one.params for one in outcomes]

    assert run("a", 0) != run("b", 1)
    assert run("c", 0) == run("a", 0)


def test_a_trial_that_diverged_is_left_out_and_a_sweep_of_such_trials_fails(tmp_path: Path) -> None:
    def some(params: Params) -> Outcome:
        one = answer(params)
        return Outcome(params, 100, 1, [float("nan")] * 2, [10, 10]) if params["loss"] == "ce" else one

    outcomes = Sweep(tmp_path / "some", "s", 0, DEPTHS).run(FIXED, 4, some, lambda *_: None)
    assert 0 < len(outcomes) < 4 and all(one.params["loss"] != "ce" for one in outcomes)
    with pytest.raises(StageError, match="no trial ended with a finite loss"):
        Sweep(tmp_path / "none", "s", 0, DEPTHS).run(FIXED[1:], 1, some, lambda *_: None)


def test_the_journal_holds_no_pickle(tmp_path: Path) -> None:
    import json

    Sweep(tmp_path / "journal", "s", 0, DEPTHS).run(FIXED, 3, answer, lambda *_: None)
    lines = (tmp_path / "journal").read_text(encoding="utf-8").splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)


def test_the_smallest_student_that_cannot_be_told_from_the_best_wins() -> None:
    def outcome(layers: int, rows: list[float]) -> Outcome:
        return Outcome({"loss": "ce", "layers": layers}, 100, layers, rows, [10] * len(rows))

    best, near, far = outcome(9, [30.0, 32.0, 31.0]), outcome(6, [31.0, 31.5, 31.0]), outcome(3, [33.0, 35.0, 34.0])
    chosen, why = winner([best, near, far])
    assert chosen is near and "within one standard error" in why
    assert winner([best, far]) == (best, "the lowest held-out loss")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_every_name_of_data_reads_back_from_the_recipe(text: str) -> None:
    from ruamel.yaml import YAML

    read = YAML(typ="safe").load(f"- source: {_plain(text)}   # as given\n")
    assert read == [{"source": text}]


def test_sources_stay_readable() -> None:
    for source in ("data/notes.jsonl", "hf:datasets/a/b@main", "pypi:evals==3.0.1/x/owt_5.jsonl"):
        assert _plain(source) == source
    assert re.fullmatch('"0"', _plain("0"))
