"""Seconds of several ways, in turns within a round, so that they meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], torch.Tensor]  # → a loss


def seconds_of(work: Work, leaves: list[torch.Tensor]) -> float:
    """One forward and backward; gradients start from nothing, as after `zero_grad`."""
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    work().backward()
    return time.perf_counter() - start


def in_turns(ways: dict[str, Work], leaves: list[torch.Tensor], rounds: int, warm: bool) -> dict[str, list[float]]:
    """Seconds of each way, round by round; with `warm`, a round before that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + warm):
        for name, work in (ways if turn % 2 == 0 else dict(reversed(ways.items()))).items():
            seconds = seconds_of(work, leaves)
            if turn >= warm:
                spent[name].append(seconds)
    return spent


def ratio(own: list[float], other: list[float]) -> dict[str, Any]:
    """Median of `own` over `other`, and the ratio of each round."""
    rounds = [mine / its for mine, its in zip(own, other, strict=True)]
    return {"median": round(statistics.median(rounds), 4), "rounds": [round(one, 4) for one in rounds]}


def fastest(spent: dict[str, list[float]]) -> str:
    """The way with the least median."""
    return min(spent, key=lambda name: statistics.median(spent[name]))


def medians(spent: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each way."""
    return {name: round(statistics.median(seconds), 4) for name, seconds in spent.items()}
