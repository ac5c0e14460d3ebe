"""The table of figures and goals: it says what the results say, and the page shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import figures


def test_the_page_shows_the_results_that_are_there() -> None:
    page = figures.README.read_text(encoding="utf-8")
    assert figures.section(figures.RESULTS) in page, "run: python benchmarks/figures.py"


@pytest.mark.parametrize(
    ("value", "sense", "reached"),
    [(1.04, "≤", "yes"), (1.06, "≤", "no"), (1.06, "≥", "yes"), (1.04, "≥", "no"), (None, "≤", "no")],
)
def test_a_figure_reaches_its_goal_on_the_right_side_only(value: float | None, sense: str, reached: str) -> None:
    assert figures.cells("x", value, 1.05, sense, ".3f")[-1] == reached


def test_a_cache_that_changed_after_a_kill_reaches_nothing(tmp_path: Path) -> None:
    flips = {"flips": 1000, "located": 999}
    kills = {"kills": 25, "captures": 7, "different": 1}
    (tmp_path / "robustness.json").write_text(json.dumps({"variants": {"mmap": {"flips": flips, "kills": kills}}}))
    rows = figures.rows_of(tmp_path)
    assert [row[-1] for row in rows["robustness"]] == ["no", "no"] and list(rows) == ["robustness"]


def test_a_searched_student_is_held_against_the_hand_made_one() -> None:
    hand_made, searched = ({"nll": nll, "decode_tps": tps, "ttft_ms": 9.0} for nll, tps in ((4.0, 50.0), (3.9, 49.0)))
    latency = {"held_out": 30, "spearman": 0.99, "median_rel_error": None}
    result = {"latency": latency, "hypervolume_ratio": 1.1, "searched": searched, "hand_made": hand_made}
    reached = [row[-1] for row in figures.search_rows(result)]
    assert reached == ["yes", "no", "no", "yes", "no", "yes"]
    assert len(list(figures.search_rows({**result, "searched": None, "hand_made": None}))) == 3
    pieces = {"ranked": {"ratio": 0.9}, "fresh": {"searched": {"nll": 4.2}, "hand_made": {"nll": 4.3}}}
    assert [row[-1] for row in figures.search_rows({**result, "measured": pieces})][3:5] == ["no", "yes"]


def test_grids_have_rows_of_what_was_measured_alone() -> None:
    way = {"bit_equal": True, "recovered": 0.81}
    programs = {"fp32_max_abs": 2e-4, "delegated": {"pte_f32": 1.0, "pte_8da4w_all": 0.94}, "bit_equal": True}
    result = {"by_model": {"student": {"Q4_0": way}, "smollm": {"8da4w": {"bit_equal": False}, "executorch": programs}}}
    reached = [row[-1] for row in figures.quantize_rows(result)]
    assert reached == ["yes", "yes", "no", "no", "no", "yes"]
