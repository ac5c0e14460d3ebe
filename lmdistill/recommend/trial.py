"""One short training and its score on held-out text: what a sweep compares, and what benchmarks/quality.py compares.

Axes: R held-out rows.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from lmdistill.evaluation.heldout import HeldOut
from lmdistill.evaluation.scorer import RowSums
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.training.config import DistillConfig


@dataclass(frozen=True)
class Score:
    """What held-out text says of a model."""

    tokens: int  # trained on
    rows: RowSums
    calibration_error: float | None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return sum(self.rows.sums["nll"]) / sum(self.rows.predictions)


def score_model(folder: Path, heldout: HeldOut, device: str) -> tuple[RowSums, float | None]:
    """A checkpoint's sums over held-out rows in float32, and its expected calibration error."""
    from lmdistill.evaluation.calibration import Calibration
    from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class
    from lmdistill.evaluation.scorer import score

    options = RuntimeOptions(heldout.sequence_length, device=device)
    model = runtime_class("transformers").open(folder, options, exact=True)
    calibration = Calibration()
    try:
        return score(model, heldout, calibration=calibration), calibration.error()
    finally:
        model.close()


def train_and_score(
    config: DistillConfig,
    student: ModelRef,
    cache: Path,
    heldout: HeldOut,
    scratch: Path,
    device: str,
    teacher: ModelRef | None = None,
) -> Score:
    """Train `student` on the cache's rows, score it, drop it; `teacher` where the loss needs it live.

    Killed in between, the next call goes on from the checkpoints in `scratch`, if they belong to the same training.
    """
    from lmdistill.errors import IntegrityError
    from lmdistill.signals.reader import SignalsReader
    from lmdistill.training.run import Place, refuse_foreign_checkpoints, train

    reader = SignalsReader(cache, "train")
    place = Place(student.path, scratch / "model", scratch / "checkpoints", device, student.digest, teacher)
    try:
        refuse_foreign_checkpoints(reader, config, place)
    except IntegrityError:  # of a training that was given up
        shutil.rmtree(scratch)
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints; what is printed here is the caller's answer
        record = train(reader, config, place, SilentProgress())
    rows, calibration_error = score_model(place.output, heldout, device)
    shutil.rmtree(scratch)
    return Score(record["tokens"], rows, calibration_error)
