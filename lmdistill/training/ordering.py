"""In which order a run sees its rows: seeded permutations, or a curriculum; fixed before the first step.

Axes: R rows of the data, N rows trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import CorpusReader, success_file
from lmdistill.curriculum.config import CurriculumConfig
from lmdistill.curriculum.difficulty import F64, Sight, find_measure, row_means
from lmdistill.curriculum.order import buckets_of, paced_order
from lmdistill.errors import IntegrityError
from lmdistill.precision import products_in
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.config import DistillConfig
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.data import SignalsCollator, row_order
from lmdistill.training.scoring import scored_rows

if TYPE_CHECKING:
    from lmdistill.training.run import Place

Reader = SignalsReader | CorpusRows
SCORE_ROWS, SCORE_CHUNK = 8, 512  # rows in a forward of the student, positions whose logits are held at once
KEPT = "difficulty.npy"  # below the work folder
SPLIT = "train"


def data_order(reader: Reader, config: DistillConfig, place: Place, model: Any, steps: int) -> NDArray[np.int64]:
    """Row numbers `[N]` of all steps. `model` is the student before training, for difficulties that ask it.

    Difficulties are kept in `place.work`: a resumed run has those of the first, whatever the student is by now.
    """
    order_N = row_order(reader.rows, steps * config.batch_rows, config.seed)
    curriculum = config.curriculum
    if curriculum is None:
        return order_N
    measured_R = _kept(place.work / KEPT, lambda: _measured(reader, curriculum, config, place, model))
    return paced_order(order_N, measured_R, curriculum, config.seed)


def curriculum_record(curriculum: CurriculumConfig | None, order_N: NDArray[np.int64], work: Path) -> dict[str, Any]:
    """For training.json: the order's sha256, and each bucket's mean difficulty; nothing without a curriculum."""
    if curriculum is None:
        return {}
    measured_R = np.load(work / KEPT, allow_pickle=False)
    bucket_R = buckets_of(measured_R, curriculum.buckets)
    sums_B = np.bincount(bucket_R, measured_R, minlength=curriculum.buckets)
    means_B = sums_B / np.maximum(1, np.bincount(bucket_R, minlength=curriculum.buckets))
    means = [round(float(mean), 5) for mean in means_B]
    order = hashlib.sha256(order_N.astype("<i8").tobytes()).hexdigest()
    return {"curriculum": {"order": order, "bucket_difficulty": means}}


def beside(place: Place) -> dict[str, Any]:
    """Identities of what a curriculum reads beside the cache: part of what checkpoints belong to."""
    judges = {"judges": [SignalsReader(folder).digest for folder in place.judges]} if place.judges else {}
    corpus = {"success": _file_digest(success_file(place.corpus))} if place.corpus else {}
    return judges | corpus


def _measured(reader: Reader, curriculum: CurriculumConfig, config: DistillConfig, place: Place, model: Any) -> F64:
    """The difficulty of every row `[R]`; IntegrityError where a judge's cache is of other rows."""
    judges = [SignalsReader(folder) for folder in place.judges]
    for judge in judges:
        if _rows_digest(judge) != _rows_digest(reader):
            raise IntegrityError(
                f"the teacher cache {judge.folder} is of other rows than {reader.folder}",
                why="an ensemble judges the same items",
                fix="run the `teach` stages of all its teachers on one corpus",
            )
    return find_measure(curriculum.difficulty).function(
        Sight(reader, judges, lambda: _student_losses(reader, config, model), lambda: _success_rates(reader, place))
    )


def _rows_digest(reader: Reader) -> str:
    """Of the tokens and flags that a cache's rows are made of."""
    return reader.manifest.splits[reader.split].corpus_digest if isinstance(reader, SignalsReader) else reader.digest


def _student_losses(reader: Reader, config: DistillConfig, model: Any) -> F64:
    """The student's mean loss on each row `[R]`, before training."""
    import torch

    collator = SignalsCollator(reader, reader.manifest.packing == "isolate")
    rows, half = range(reader.rows), products_in(config.precision, model.device.type) == "bfloat16"
    with torch.compiler.set_stance("force_eager"):  # blocks are compiled for the shape of a training step
        scored = scored_rows(model, collator, rows, SCORE_ROWS, SCORE_CHUNK, half)
        return np.concatenate([row_means(-lp_RT, ~np.isnan(lp_RT)) for lp_RT in scored])


def _success_rates(reader: Reader, place: Place) -> F64:
    """The success rates `[R]` that the corpus stage has kept; IntegrityError where they are of other rows."""
    assert place.corpus is not None
    corpus = CorpusReader(place.corpus)
    if corpus.digest(SPLIT) != _rows_digest(reader):
        raise IntegrityError(
            f"the teacher cache {reader.folder} is of other rows than the corpus {place.corpus}",
            fix="name both with `from:`, of one corpus",
        )
    rates_R: F64 = np.load(success_file(place.corpus), allow_pickle=False).astype(np.float64)
    return rates_R


def _kept(path: Path, make: Callable[[], F64]) -> F64:
    """What is in the file, or is made and put there whole or not at all."""
    if not path.exists():
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.save(file, make(), allow_pickle=False)
        partial.rename(path)
    kept: F64 = np.load(path, allow_pickle=False)
    return kept


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
