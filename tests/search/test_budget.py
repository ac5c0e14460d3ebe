"""Budgets: what can be written, what it means, and what is said where no student can keep them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from toys.search_shapes import TOY, known_profile, toy_whole

from lmdistill.search.budget import Budget, parse, violations
from lmdistill.search.design import spread_out, teacher_candidate
from lmdistill.search.feasible import infeasible, teacher_figures, unmeasured
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.latency import LatencyModel


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("decode_tps >= 50", Budget("decode_tps", 50)),
        ("ttft_ms<=400", Budget("ttft_ms", 400)),
        (" ttft_ms@2048 <= 1.5e3 ", Budget("ttft_ms", 1500, prompt=2048)),
        ("ram_mb <= 300", Budget("ram_mb", 300)),
        ("file_mb <= 80.5", Budget("file_mb", 80.5)),
        ("decode >= 2.0x teacher", Budget("decode_tps", 2, relative=True)),
        ("ttft@1024 <= 0.5 x teacher", Budget("ttft_ms", 0.5, relative=True, prompt=1024)),
        ("file <= 0.5x teacher", Budget("file_mb", 0.5, relative=True)),
    ],
)
def test_a_budget_is_read_and_written_back(text: str, budget: Budget) -> None:
    assert parse(text) == budget
    assert parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decode_tsp >= 50", "did you mean 'decode_tps'"),
        ("decode_tps <= 50", "better when higher"),
        ("ttft_ms >= 400", "better when lower"),
        ("decode_tps > 50", "is no budget"),
        ("decode >= 2", "no figure 'decode'"),
        ("decode_tps >= 2x teacher", "without its unit"),
        ("ram_mb@512 <= 3", "only ttft_ms"),
        ("ram_mb <= 0", "bounds nothing"),
        ("ram_mb <= -3", "is no budget"),
        ("", "is no budget"),
    ],
)
def test_what_is_no_budget_is_said_with_what_is(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_a_recipe_with_a_wrong_budget_or_an_untimed_prompt_is_refused() -> None:
    with pytest.raises(ValidationError, match="is no budget"):
        DeviceSearchConfig(budgets=["fast please"])
    with pytest.raises(ValidationError, match="add 2048 to timing"):
        DeviceSearchConfig(budgets=["ttft_ms@2048 <= 9"])
    assert DeviceSearchConfig(budgets=["ttft_ms@512 <= 9"]).bounds == (Budget("ttft_ms", 9, prompt=512),)


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.booleans())
def test_a_budget_is_violated_exactly_where_it_is_missed(bound: float, value: float, faster: bool) -> None:
    budget = Budget("decode_tps", bound) if faster else Budget("ram_mb", bound)
    (missed,) = violations([budget], {budget.metric: value})
    assert (missed <= 0) == (value >= bound if faster else value <= bound)


def test_a_relative_budget_is_in_units_of_the_teachers_figure() -> None:
    budget, teacher = parse("decode >= 2x teacher"), {"decode_tps": 30.0}
    assert budget.limit(teacher) == 60
    assert budget.violation({"decode_tps": 45.0}, teacher) == pytest.approx(0.25)


def test_infeasible_budgets_are_said_with_the_limits_and_the_nearest_point() -> None:
    sub = toy_whole()
    profile = known_profile([teacher_candidate(TOY), *spread_out(sub, 24, 0)], sub.largest())
    model = LatencyModel.fit(profile)
    teacher = teacher_figures(profile, model, TOY)
    assert teacher["decode_tps"] == pytest.approx(model.predict(teacher_candidate(TOY)).figures["decode_tps"], rel=0.02)
    reachable = max(model.predict(c).figures["decode_tps"] for c in sub.one_of_each_shape())

    assert infeasible([], [sub], model, teacher) is None
    assert infeasible([parse(f"decode_tps >= {0.9 * reachable:.0f}")], [sub], model, teacher) is None
    error = infeasible([parse(f"decode_tps >= {2 * reachable:.0f}")], [sub], model, teacher)
    assert error is not None
    assert f"decode_tps is at most {reachable:,.0f} on this device" in error.why
    assert f"decode_tps {reachable:,.0f}" in error.fix and "layers" in error.fix

    best_file = min(model.predict(c).figures["file_mb"] for c in sub.one_of_each_shape())
    both = [parse("decode >= 1.01x teacher"), parse(f"file_mb <= {best_file / 2:.4f}")]
    error = infeasible(both, [sub], model, teacher)
    assert error is not None and "file_mb is at least" in error.why and "decode_tps is" not in error.why
    assert "'decode >= 1.01x teacher' and 'file_mb <=" in error.what


def test_what_the_nearest_point_reaches_is_feasible() -> None:
    sub, rng = toy_whole(), random.Random(1)
    model = LatencyModel.fit(known_profile([sub.sample(rng) for _ in range(30)], sub.largest()))
    figures = [model.predict(c).figures for c in sub.one_of_each_shape()]
    fastest = max(each["decode_tps"] for each in figures)
    assert infeasible([Budget("decode_tps", fastest)], [sub], model, {}) is None
    assert infeasible([Budget("decode_tps", fastest * 1.001)], [sub], model, {}) is not None


def test_a_prompt_that_the_profile_lacks_is_named() -> None:
    profile = known_profile([], toy_whole().largest())
    assert unmeasured([parse("ttft_ms@2048 <= 9"), parse("ttft_ms@1024 <= 9")], profile) == [
        "'ttft_ms@2048 <= 9': the profile has prompts of 512, 1024 tokens"
    ]
