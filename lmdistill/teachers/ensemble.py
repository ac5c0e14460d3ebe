"""Several teachers as one: the mean of their probabilities over one vocabulary (MEAL V2).

Axes: B rows, T tokens in a row, C tokens of one chunk, V vocabulary, M teachers.
The full distributions are averaged, chunk by chunk, and only then cut to the top K: the tail and `lp_next` are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError, StageError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.chunks import Chunks, LogitEngine, reduce_chunks
from lmdistill.teachers.engine import EngineOptions, TopK
from lmdistill.teachers.registry import ENGINES, create_engine

STEP = 64  # tokens averaged at once: bounds what is held beside the members' own chunks


def check_ensemble(engine: str) -> None:
    """Raise PreflightError where the engine tells only its top K: the mean's top K may lie outside of them."""
    if ENGINES[engine].logits:
        return
    able = sorted(name for name, entry in ENGINES.items() if entry.logits)
    raise PreflightError(
        f"engine '{engine}' cannot run an ensemble of teachers",
        why="it tells the likeliest ids only, and the mean needs every id's probability from every teacher",
        fix=f"use one of: {', '.join(able)}",
    )


def normalised(weights: Sequence[float], members: int) -> tuple[float, ...]:
    """Weights that sum to 1, equal where none are given."""
    given = tuple(weights) or (1.0,) * members
    return tuple(weight / math.fsum(given) for weight in given)


def mean_chunks(streams: Sequence[Chunks], weights: Sequence[float]) -> Chunks:
    """The log of the weighted mean of M distributions, `[C, V]` in float32, from M streams of logits.

    The streams may cut their tokens at different places. Raises StageError where one ends before the others.
    """
    held: list[Any] = [()] * len(streams)  # what is left of each stream's chunk
    at = 0
    while True:
        held = [left if len(left) else next(stream, (0, ()))[1] for left, stream in zip(held, streams, strict=True)]
        size = min(STEP, *map(len, held))
        if size == 0:
            if any(map(len, held)):
                raise StageError(f"the teachers of the ensemble scored different numbers of tokens (one ended at {at})")
            return
        yield at, mean_log_probs([left[:size] for left in held], weights)
        held = [left[size:] for left in held]
        at += size


def mean_log_probs(logits_MCV: Sequence[Any], weights: Sequence[float]) -> Any:
    """log Σ wₘ·softmax(logitsₘ) over the last axis, in float32, never leaving the log domain."""
    import torch

    mean_CV = None
    for logits_CV, weight in zip(logits_MCV, weights, strict=True):
        part_CV = logits_CV.float().log_softmax(dim=-1).add_(math.log(weight))
        mean_CV = part_CV if mean_CV is None else torch.logaddexp(mean_CV, part_CV)
    return mean_CV


class EnsembleEngine:
    """One engine of the registry for each teacher, all in this process; scores with the mean of what they say."""

    def __init__(self, engine: str, others: Sequence[ModelRef], weights: Sequence[float]) -> None:
        """`others` are the teachers beside the one that `open` is given; `weights` are the members' in that order."""
        check_ensemble(engine)
        self._others = tuple(others)
        self._weights = normalised(weights, 1 + len(self._others))
        self._members: list[LogitEngine] = [_logit_engine(engine) for _ in self._weights]

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Load every teacher; raises LmdistillError where one cannot do what the options ask."""
        self._k = options.k
        for member, model in zip(self._members, (teacher, *self._others), strict=True):
            member.open(model, options)

    def version(self) -> str:
        """The engine's packages with their versions."""
        return self._members[0].version()

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Top-K of the mean distribution at every position."""
        return reduce_chunks(self.logit_chunks(tokens_BT, starts_BT), tokens_BT, self._k)

    def logit_chunks(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> Chunks:
        """The mean distribution's log-probs, which are logits of it; see `LogitEngine`."""
        streams = [member.logit_chunks(tokens_BT, starts_BT) for member in self._members]
        return mean_chunks(streams, self._weights)


def _logit_engine(name: str) -> LogitEngine:
    return cast(LogitEngine, create_engine(name))  # `logits` in the registry says that it is one
