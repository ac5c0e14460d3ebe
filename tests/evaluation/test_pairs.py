"""Students against baselines: who is compared with whom, and what is said where the trainings were not alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmdistill.evaluation.pairs import compare
from lmdistill.evaluation.scorer import RowSums
from lmdistill.pipeline.stage import Artefact

ALIKE = {"start": "a", "text": "t", "tokens": 8192}


def models(folder: Path, trainings: dict[str, dict[str, Any] | None]) -> list[Artefact]:
    found = []
    for name, record in trainings.items():
        out = folder / name / "out"
        out.mkdir(parents=True)
        if record is not None:
            (out / "training.json").write_text(json.dumps(record))
        found.append(Artefact(name, "distill", "model", f"digest-of-{name}", folder / name))
    return found


def scores(*names: str) -> dict[str, RowSums]:
    """Every model a tenth of a nat a token worse than the one before."""
    return {name: RowSums([10, 20], [40, 80], {"nll": [30.0 + i, 50.0 + 2 * i]}) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({}, []),
        ({"tokens": 2048}, ["tokens"]),
        ({"start": "b", "text": "u"}, ["start", "text"]),
        ({"start": None}, ["start"]),
    ],
)
def test_a_baseline_that_was_trained_otherwise_says_in_what(
    tmp_path: Path, changed: dict[str, Any], differs: list[str]
) -> None:
    made = models(tmp_path, {"kd": {"loss": "decoupled_topk", **ALIKE}, "ce": {"loss": "ce", **ALIKE, **changed}})
    (pair,) = compare(made, scores("kd", "ce"))
    assert pair["differs"] == differs
    assert (pair["student"], pair["baseline"]) == ("kd", "ce")
    assert pair["nll"] == pytest.approx(-0.1)


def test_what_no_record_says_is_not_taken_for_equal(tmp_path: Path) -> None:
    made = models(tmp_path, {"kd": {"loss": "decoupled_topk", "tokens": 8192}, "ce": {"loss": "ce", "tokens": 8192}})
    assert compare(made, scores("kd", "ce"))[0]["differs"] == ["start", "text"]


def test_an_untrained_student_is_compared_with_no_baseline(tmp_path: Path) -> None:
    made = models(tmp_path, {"student": None, "kd": {"loss": "js", **ALIKE}, "ce": {"loss": "ce", **ALIKE}})
    assert [pair["student"] for pair in compare(made, scores("student", "kd", "ce"))] == ["kd"]
