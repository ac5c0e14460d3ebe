"""The one scorer: a runtime's log-probabilities on held-out tokens against the text, the teacher and the parent.

Axes: R rows, T tokens of a sequence, N predictions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmdistill.evaluation import divergence
from lmdistill.evaluation.calibration import Calibration
from lmdistill.evaluation.heldout import HeldOut, ScoredSequence
from lmdistill.evaluation.references import Reference, ReferenceWriter
from lmdistill.evaluation.runtimes import ScoringRuntime

if TYPE_CHECKING:
    import torch

MEANS = ("nll", "kl_to_teacher", "kl_to_parent", "top1_to_parent")


@dataclass
class RowSums:
    """Sums over each row's predictions, float64; a measure that was not taken has no entry."""

    predictions: list[int]
    bytes: list[int]
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, measure: str, row: int, value: float) -> None:
        """Add `value` to a row's sum of `measure`."""
        self.sums.setdefault(measure, [0.0] * len(self.predictions))[row] += value

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def summarise(rows: RowSums) -> dict[str, float | None]:
    """Means a prediction and their standard errors over rows (`<measure>_se`), and bits a byte."""
    figures: dict[str, float | None] = {}
    for measure in MEANS:
        figures[measure] = figures[f"{measure}_se"] = None
        if measure in rows.sums:
            figures[measure], figures[f"{measure}_se"] = divergence.ratio_and_error(
                rows.sums[measure], rows.predictions
            )
    bits_R = np.asarray(rows.sums["nll"]) / math.log(2)
    figures["bits_per_byte"], figures["bits_per_byte_se"] = divergence.ratio_and_error(bits_R, rows.bytes)
    return figures


def paired_gap(rows: RowSums, other: RowSums, measure: str = "nll") -> tuple[float, float | None]:
    """Mean of `rows` minus mean of `other` on the same predictions, with its standard error over rows."""
    difference_R = np.asarray(rows.sums[measure]) - np.asarray(other.sums[measure])
    return divergence.ratio_and_error(difference_R, rows.predictions)


def score(
    runtime: ScoringRuntime,
    heldout: HeldOut,
    *,
    teacher: Reference | None = None,
    parent: Reference | None = None,
    keep: ReferenceWriter | None = None,
    calibration: Calibration | None = None,
    on_sequence: Callable[[int], None] = lambda done: None,
) -> RowSums:
    """Score `runtime` on every held-out prediction; `keep` receives its own log-probabilities as a reference.

    `calibration` gathers how sure it was and how often right.
    """
    import torch

    predictions_R = [0] * heldout.rows
    for sequence in heldout.sequences:
        predictions_R[sequence.row] += len(sequence.positions_N)
    rows = RowSums(predictions_R, [int(count) for count in heldout.bytes_R])
    start = 0
    for done, sequence in enumerate(heldout.sequences, 1):
        log_x_TV = torch.from_numpy(runtime.log_probs(sequence.tokens_T, heldout.vocab_size))
        log_x_NV = log_x_TV[torch.from_numpy(sequence.positions_N)]
        if keep is not None:
            keep.append(log_x_NV)
        if calibration is not None:
            calibration.add(log_x_NV, torch.from_numpy(sequence.targets_N))
        _add_sequence(rows, sequence, log_x_NV, start, teacher, parent)
        start += len(sequence.positions_N)
        on_sequence(done)
    return rows


def _add_sequence(
    rows: RowSums,
    sequence: ScoredSequence,
    log_x_NV: torch.Tensor,
    start: int,
    teacher: Reference | None,
    parent: Reference | None,
) -> None:
    """Add one sequence's sums; `start` is the place of its first prediction in the references."""
    import torch

    stop = start + len(log_x_NV)
    targets_N = torch.from_numpy(sequence.targets_N)
    rows.add("nll", sequence.row, float(divergence.nll(log_x_NV, targets_N).sum()))
    compared: dict[Reference, tuple[float, float]] = {}  # one reading where the teacher is the parent
    for reference in (teacher, parent):
        if reference is not None and reference not in compared:
            log_p_NV = reference.read(start, stop)
            divergences, agreements = divergence.kl(log_p_NV, log_x_NV), divergence.agrees(log_p_NV, log_x_NV)
            compared[reference] = float(divergences.sum()), float(agreements.sum())
    if teacher is not None:
        rows.add("kl_to_teacher", sequence.row, compared[teacher][0])
    if parent is not None:
        rows.add("kl_to_parent", sequence.row, compared[parent][0])
        rows.add("top1_to_parent", sequence.row, compared[parent][1])
