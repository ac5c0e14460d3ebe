"""Answers from a `.pte`: one token after the other, sampled as a preset says.

Axes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmdistill.deployment.runner import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmdistill.deployment.executorch.runtime import ExecutorchRuntime


def choose(logits_V: NDArray[np.float32], before: Sequence[int], sampling: Sampling, draw: float) -> int:
    """The next token; `draw` is a number from 0 to 1 that decides where chance does."""
    scores_V = logits_V.astype(np.float64)
    if sampling.repeat_penalty != 1 and before:
        seen = np.unique(np.asarray(before))
        scores_V[seen] = np.where(
            scores_V[seen] > 0, scores_V[seen] / sampling.repeat_penalty, scores_V[seen] * sampling.repeat_penalty
        )
    order_V = np.argsort(-scores_V, kind="stable")
    if sampling.temperature == 0:
        return int(order_V[0])
    order_V = order_V[: sampling.top_k or None]
    weights = np.exp((scores_V[order_V] - scores_V[order_V[0]]) / sampling.temperature)
    probabilities = weights / weights.sum()
    before_it = np.concatenate(([0.0], probabilities.cumsum()[:-1]))
    kept = (before_it < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[0])
    cumulative = (probabilities * kept).cumsum()
    return int(order_V[min(np.searchsorted(cumulative, draw * cumulative[-1], side="right"), kept.nonzero()[0][-1])])


def generate(
    runtime: ExecutorchRuntime, prompt: Sequence[int], sampling: Sampling, ends: frozenset[int], limit: int
) -> Iterator[int]:
    """Tokens after `prompt` until one of `ends`, `limit` tokens, or the end of the caches."""
    chance, ids = np.random.default_rng(sampling.seed), list(prompt)
    logits_V = runtime.read(ids).numpy()
    for _ in range(min(limit, runtime.context - len(ids))):
        token = choose(logits_V, ids, sampling, float(chance.random()))
        if token in ends:
            return
        yield token
        ids.append(token)
        if len(ids) < runtime.context:
            logits_V = runtime.read(ids[-1:], len(ids) - 1).numpy()
