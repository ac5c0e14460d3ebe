"""Gates: the grammar, what keeps a promise, and messages for wrong ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmdistill.errors import StageError
from lmdistill.evaluation.gates import Gate, check, demand

ONE_BOUND = "a gate has `at_most` or `at_least`, one of them"
LADDER = [
    {"name": "teacher", "nll": 3.8, "prefill_tps": None},
    {"name": "ce", "nll": 4.5},
    {"name": "distill", "nll": 4.4},
    {"name": "export/q4_0", "nll": 4.45, "prefill_tps": 900.0, "decode_tps": 210.0},
    {"name": "teacher_files/q4_0", "nll": 3.85, "prefill_tps": 500.0, "decode_tps": 150.0},
    {"name": "broken", "nll": math.nan},
]


def gate(**keys: Any) -> Gate:
    return Gate.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "limit", "passed"),
    [
        ({"of": "distill", "metric": "nll", "at_most": {"of": "ce"}}, 4.5, True),
        ({"of": "ce", "metric": "nll", "at_most": {"of": "distill"}}, 4.4, False),
        ({"of": "distill", "metric": "nll", "at_most": {"of": "teacher", "plus": 0.7}}, 4.5, True),
        ({"of": "distill", "metric": "nll", "at_most": {"of": "teacher", "plus": 0.5}}, 4.3, False),
        (
            {
                "of": "export/q4_0",
                "metric": "prefill_tps",
                "at_least": {"of": "teacher_files/q4_0", "times": 1.5},
            },
            750.0,
            True,
        ),
        (
            {
                "of": "export/q4_0",
                "metric": "decode_tps",
                "at_least": {"of": "teacher_files/q4_0", "times": 1.5},
            },
            225.0,
            False,
        ),
        ({"of": "distill", "metric": "nll", "at_most": 4.4}, 4.4, True),
        ({"of": "distill", "metric": "nll", "at_least": 4.4}, 4.4, True),
        (
            {
                "of": "export/q4_0",
                "metric": "prefill_tps",
                "at_least": {"of": "teacher_files/q4_0", "metric": "decode_tps"},
            },
            150.0,
            True,
        ),
    ],
)
def test_a_gate_compares_a_figure_with_its_limit(keys: dict[str, Any], limit: float, passed: bool) -> None:
    (result,) = check([gate(**keys)], LADDER)
    assert result.limit == pytest.approx(limit)
    assert result.passed is passed


SPEED_GATE = {"of": "a", "metric": "decode_tps", "at_least": {"of": "b", "times": 1.5}}


def test_speeds_of_the_same_rounds_are_compared_round_by_round() -> None:
    """Both files are slow in one round and fast in another: the ratio stays, the medians would say 0.75."""
    ours, others = [160.0, 16.0, 16.0], [100.0, 100.0, 10.0]
    ladder = [
        {"name": "a", "decode_tps": 16.0, "rounds": {"decode_tps": ours}},
        {"name": "b", "decode_tps": 100.0, "rounds": {"decode_tps": others}},
    ]
    (result,) = check([gate(**SPEED_GATE)], ladder)
    assert result.passed and result.measured == pytest.approx(1.6) and result.limit == 1.5
    assert result.quartiles == pytest.approx((0.88, 1.6))
    assert "measured 1.6 times (quartiles 0.88 to 1.6 of the rounds), limit 1.5" in result.shown()


@given(st.lists(st.floats(1, 1e3), min_size=2, max_size=9), st.floats(1.01, 3))
def test_a_file_faster_in_every_round_by_more_than_the_limit_passes_whatever_drifts(
    drift: list[float], faster: float
) -> None:
    ladder = [
        {"name": "a", "decode_tps": 0.0, "rounds": {"decode_tps": [faster * 1.5 * pace for pace in drift]}},
        {"name": "b", "decode_tps": 1.0, "rounds": {"decode_tps": drift}},
    ]
    assert check([gate(**SPEED_GATE)], ladder)[0].passed
    slower = {**SPEED_GATE, "at_least": {"of": "b", "times": 1.5 * faster * 1.01}}
    assert not check([gate(**slower)], ladder)[0].passed


def test_rounds_of_unequal_number_are_not_paired() -> None:
    ladder = [
        {"name": "a", "decode_tps": 20.0, "rounds": {"decode_tps": [20.0, 20.0]}},
        {"name": "b", "decode_tps": 10.0, "rounds": {"decode_tps": [10.0]}},
    ]
    (result,) = check([gate(**SPEED_GATE)], ladder)
    assert result.quartiles is None and result.limit == 15.0 and result.passed


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-3, 3), st.floats(-3, 3))
def test_the_limit_is_times_then_plus(measured: float, other: float, times: float, plus: float) -> None:
    """For all figures: passed means measured ≤ other × times + plus."""
    ladder = [{"name": "a", "nll": measured}, {"name": "b", "nll": other}]
    (result,) = check([gate(of="a", metric="nll", at_most={"of": "b", "times": times, "plus": plus})], ladder)
    assert result.passed == (measured <= other * times + plus)


@pytest.mark.parametrize(
    "keys",
    [
        {"of": "teacher", "metric": "prefill_tps", "at_least": 1},  # null
        {"of": "broken", "metric": "nll", "at_most": 100},  # not a number
        {"of": "gone", "metric": "nll", "at_most": 100},
        {"of": "distill", "metric": "nll", "at_most": {"of": "broken"}},
    ],
)
def test_what_was_not_measured_keeps_no_promise(keys: dict[str, Any]) -> None:
    (result,) = check([gate(**keys)], LADDER)
    assert not result.passed


def test_failing_gates_raise_and_are_listed() -> None:
    gates = [
        gate(of="distill", metric="nll", at_most={"of": "ce"}),
        gate(of="distill", metric="nll", at_most={"of": "teacher", "plus": 0.1}),
        gate(of="gone", metric="nll", at_most=1),
    ]
    results = check(gates, LADDER)
    with pytest.raises(StageError) as caught:
        demand([result for result in results if not result.passed], Path("runs/x/report.html"))
    text = str(caught.value)
    assert "2 quality gates of the recipe failed" in text
    assert "ce nll" not in text
    assert "distill nll ≤ teacher nll + 0.1  measured 4.4, limit 3.9" in text
    assert "gone nll ≤ 1                     measured not measured, limit 1" in text
    assert "read runs/x/report.html" in text
    demand([], Path("page"))  # all kept: says nothing


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"of": "distill", "metric": "nil", "at_most": 1}, "no metric 'nil'; did you mean 'nll'?"),
        (
            {"of": "distill", "metric": "nll", "at_most": {"of": "ce", "metric": "kl_to_techer"}},
            "did you mean 'kl_to_teacher'",
        ),
        ({"of": "distill", "metric": "nll"}, ONE_BOUND),
        (
            {"of": "distill", "metric": "nll", "at_most": 1, "at_least": 0},
            "a gate has `at_most` or `at_least`, one of them",
        ),
        ({"of": "distill", "metric": "nll", "at_most": {"plus": 1}}, "a limit is a number or has `of`"),
        ({"of": "distill", "metric": "nll", "at_most": {"value": 1, "of": "ce"}}, "a limit is a number or has `of`"),
        ({"of": "distill", "metric": "nll", "at_most": {"than": "ce"}}, "Extra inputs are not permitted"),
        ({"of": "distill", "metric": "nll", "at_most": math.nan}, "finite number"),
        ({"metric": "nll", "at_most": 1}, "Field required"),
    ],
)
def test_a_wrong_gate_says_what_is_wrong(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        gate(**keys)
    assert message in str(caught.value)
