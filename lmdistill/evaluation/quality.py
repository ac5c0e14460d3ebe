"""Scores every row of the ladder, one model in memory at a time, resuming after the last one that was finished."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.errors import StageError
from lmdistill.evaluation.heldout import HeldOut
from lmdistill.evaluation.ladder import TEACHER, Subject
from lmdistill.evaluation.references import Reference, ReferenceWriter
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class
from lmdistill.evaluation.scorer import RowSums, paired_gap, score, summarise
from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Progress


@dataclass(frozen=True)
class QualityRun:
    """What the scorer is to do, and where it may keep its scratch files."""

    subjects: Sequence[Subject]
    heldout: HeldOut
    work: Path
    compare: bool  # against teacher and parent: needs references on disk
    options: RuntimeOptions
    progress: Progress


def _scratch(work: Path, subject: str, suffix: str) -> Path:
    return work / (subject.replace("/", "__") + suffix)


def _reference(run: QualityRun, name: str | None) -> Reference | None:
    if name is None or not run.compare:
        return None
    path = _scratch(run.work, name, ".ref")
    return Reference(path, run.heldout.predictions, run.heldout.vocab_size)


def _score_one(run: QualityRun, subject: Subject, done: int, keep: bool) -> RowSums:
    """Open, score and close one subject; with `keep`, publish its log-probabilities as a reference."""
    total, count = len(run.subjects), len(run.heldout.sequences)
    teacher = _reference(run, TEACHER if subject.name != TEACHER else None)
    parent = teacher if subject.parent == TEACHER else _reference(run, subject.parent)
    writer = ReferenceWriter(_scratch(run.work, subject.name, ".ref")) if keep else nullcontext()
    model = runtime_class(subject.runtime).open(subject.path, run.options, exact=True)
    try:
        with writer as kept:
            rows = score(
                model,
                run.heldout,
                teacher=teacher,
                parent=parent,
                keep=kept,
                on_sequence=lambda at: run.progress.update(done + at / count, total, "models", scoring=subject.name),
            )
    finally:
        model.close()
    for measure, sums_R in rows.sums.items():
        if not all(map(math.isfinite, sums_R)):
            raise StageError(
                f"'{subject.name}' has no finite {measure} on the held-out text",
                why="its weights or logits hold infinities or NaN",
                fix="look at the loss curve of the stage that made it; a lower learning rate often helps",
            )
    return rows


def score_all(run: QualityRun) -> dict[str, RowSums]:
    """Row sums of every subject by name. Peak disk: the teacher's reference and one parent's."""
    run.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, RowSums] = {}
    scores = {subject.name: _scratch(run.work, subject.name, ".score.json") for subject in run.subjects}
    for done, subject in enumerate(run.subjects):
        children = [row.name for row in run.subjects if subject.name in (row.parent, TEACHER) and row is not subject]
        waiting = run.compare and any(not scores[name].exists() for name in children)
        kept = _scratch(run.work, subject.name, ".ref").exists()
        if not scores[subject.name].exists() or (waiting and not kept):
            write_json(scores[subject.name], _score_one(run, subject, done, keep=waiting).to_json())
        found[subject.name] = RowSums(**json.loads(scores[subject.name].read_text()))
        if subject.role == "file" and subject.parent != TEACHER:
            _drop_reference(run, subject.parent, scores)
    _scratch(run.work, TEACHER, ".ref").unlink(missing_ok=True)
    return found


def _drop_reference(run: QualityRun, parent: str | None, scores: dict[str, Path]) -> None:
    """Delete a parent's reference once all its files have their scores."""
    if parent and all(scores[row.name].exists() for row in run.subjects if row.parent == parent):
        _scratch(run.work, parent, ".ref").unlink(missing_ok=True)


def describe(subjects: Sequence[Subject], sums: dict[str, RowSums]) -> list[dict[str, Any]]:
    """The ladder's deterministic half: what each row is and how well it predicts."""
    rows = []
    for subject in subjects:
        gap, gap_error = paired_gap(sums[subject.name], sums[TEACHER])
        rows.append(
            {
                "name": subject.name,
                "role": subject.role,
                "runtime": subject.runtime,
                "format": subject.format,
                "parent": subject.parent,
                "params": subject.params,
                "file_bytes": subject.file_bytes,
                "fallback_share": subject.fallback_share,
                **summarise(sums[subject.name]),
                "nll_gap": gap,
                "nll_gap_se": gap_error,
                **({"note": subject.note} if subject.note else {}),
            }
        )
    return rows
