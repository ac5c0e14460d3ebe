"""Trained students against baselines on the same predictions; whether both had an equal start, text and tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmdistill.pipeline.stage import Artefact

if TYPE_CHECKING:
    from lmdistill.evaluation.scorer import RowSums

EQUAL = ("start", "text", "tokens")  # what two trainings must share for one's gain to be its objective's


def training_record(model: Artefact) -> dict[str, Any] | None:
    """How a model was trained; None for one that was not."""
    path = model.out / "training.json"
    record: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return record


def is_baseline(record: Mapping[str, Any] | None) -> bool:
    """Whether a model was trained without the teacher (cross-entropy alone)."""
    return record is not None and record["loss"] == "ce"


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which of start, text and tokens two trainings do not share; what a record does not say counts as not shared."""
    return [key for key in EQUAL if one.get(key) is None or one.get(key) != other.get(key)]


def compare(models: Sequence[Artefact], sums: Mapping[str, RowSums]) -> list[dict[str, Any]]:
    """Every trained student with every baseline: the gap in nats a token, its standard error, and what `differs`."""
    from lmdistill.evaluation.scorer import paired_gap

    records = {model.name: training_record(model) for model in models if model.name in sums}
    trained = {name: record for name, record in records.items() if record is not None}
    baselines = [name for name, record in trained.items() if is_baseline(record)]
    found = []
    for student in (name for name in trained if name not in baselines):
        for baseline in baselines:
            gap, error = paired_gap(sums[student], sums[baseline])
            differs = differing(trained[student], trained[baseline])
            found.append({"student": student, "baseline": baseline, "nll": gap, "nll_se": error, "differs": differs})
    return found
