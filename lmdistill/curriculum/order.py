"""The order of a curriculum: fixed before training, a function of difficulties, keys and seed alone.

Axes: R rows of the data, N rows trained on, in order (a row comes again in every epoch), B buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.curriculum.config import CurriculumConfig
from lmdistill.curriculum.pacing import open_share

Indices = NDArray[np.int64]
STREAM = 1  # of random numbers: not the one that the plain order of the same seed comes from
ROUNDING = 1e-9  # of a share that should be a bucket's edge


def buckets_of(difficulty_R: NDArray[Any], buckets: int) -> Indices:
    """The bucket of every row `[R]`: parts of the rows by rank of difficulty; among equals the earlier row first."""
    rows = len(difficulty_R)
    ranks_R = np.empty(rows, np.int64)
    ranks_R[np.argsort(difficulty_R, kind="stable")] = np.arange(rows)
    return ranks_R * buckets // rows


def openings(bucket_R: Indices, config: CurriculumConfig, places: int) -> list[int]:
    """The place of the order from which on each bucket's rows may come; the first bucket is open from the start."""
    counts_B = np.bincount(bucket_R, minlength=config.buckets)
    edges_B = (np.cumsum(counts_B) - counts_B) / len(bucket_R)
    found = [
        bisect_left(range(places), edge - ROUNDING, key=lambda place: open_share(config, place / places))
        for edge in edges_B
    ]
    return [0, *found[1:]]


def paced_order(order_N: Indices, difficulty_R: NDArray[Any], config: CurriculumConfig, seed: int) -> Indices:
    """The rows of `order_N` as often as there, easy ones first: drawn without return from the buckets that are open.

    A bucket opens at its place, or earlier where the open ones have nothing left.
    """
    bucket_R = buckets_of(difficulty_R, config.buckets)
    generator = np.random.default_rng([seed, STREAM])
    bucket_N = bucket_R[order_N]
    stops = [*openings(bucket_R, config, len(order_N))[1:], len(order_N)]
    parts: list[Indices] = []
    pool, done = order_N[:0], 0
    for bucket, stop in enumerate(stops):
        pool = generator.permutation(np.concatenate([pool, order_N[bucket_N == bucket]]))
        take = max(0, stop - done)
        parts.append(pool[:take])
        done, pool = done + len(parts[-1]), pool[take:]
    return np.concatenate(parts)
