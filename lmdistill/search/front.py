"""Which candidates no other one beats, and how much of the space of losses and costs they leave behind them.

Axes: N candidates, M objectives.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmdistill.search.scored import Scored


def front(scored: Sequence[Scored], objectives: Sequence[str]) -> list[Scored]:
    """The feasible candidates that none of the others equals or beats in everything; lowest loss first."""
    feasible = list({one.candidate.digest: one for one in scored if one.feasible}.values())
    values_NM = np.array([one.values(objectives) for one in feasible])
    kept = [
        one
        for place, one in enumerate(feasible)
        if not ((values_NM <= values_NM[place]).all(1) & (values_NM < values_NM[place]).any(1)).any()
    ]
    return sorted(kept, key=lambda one: (one.values(objectives), one.candidate.digest))


def hypervolume(points_NM: NDArray[np.float64], reference_M: NDArray[np.float64]) -> float:
    """The share of the box between zero and the reference that the points dominate (Optuna's WFG)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optuna._hypervolume import compute_hypervolume

    inside_NM = points_NM[(points_NM <= reference_M).all(1)] / reference_M
    if not len(inside_NM):
        return 0.0
    return float(compute_hypervolume(inside_NM, np.ones(len(reference_M))))


def reference_of(scored: Sequence[Scored], objectives: Sequence[str]) -> NDArray[np.float64]:
    """The worst value of each objective among the feasible candidates `[M]`."""
    worst_M: NDArray[np.float64] = np.array([one.values(objectives) for one in scored if one.feasible]).max(0)
    return worst_M
