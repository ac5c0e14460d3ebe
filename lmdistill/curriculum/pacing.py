"""Pacing functions: the share of the rows, easiest first, that is open at a point of the training.

One decorated function each, from x, the share of the span `until` that is behind, to the share of the way from `start`
to all rows. The families are those of Wu, Dyer and Neyshabur (arXiv 2012.03107, section 2), without their two
near-duplicates of `root` and `step`.
"""

from __future__ import annotations

from collections.abc import Callable

from lmdistill.curriculum.config import CurriculumConfig
from lmdistill.errors import RecipeError, nearest

Pacing = Callable[[float], float]

_PACINGS: dict[str, Pacing] = {}


def pacing(name: str) -> Callable[[Pacing], Pacing]:
    """Register a function that rises from 0 at 0 to 1 at 1."""

    def register(function: Pacing) -> Pacing:
        _PACINGS[name] = function
        return function

    return register


def pacings() -> dict[str, str]:
    """All pacing functions by name, with what they do."""
    return {name: (function.__doc__ or "").strip() for name, function in sorted(_PACINGS.items())}


@pacing("linear")
def linear(x: float) -> float:
    """The same number of rows at every step; with start 0 and until 1, bucket after bucket."""
    return x


@pacing("root")
def root(x: float) -> float:
    """Hard rows early: the square root."""
    return float(x**0.5)


@pacing("quadratic")
def quadratic(x: float) -> float:
    """Hard rows late: the square."""
    return x * x


@pacing("step")
def step(x: float) -> float:
    """All at once, at the end of the span."""
    return float(x >= 1.0)


def open_share(config: CurriculumConfig, at: float) -> float:
    """The share of the rows that is open at `at` of the training; RecipeError for an unknown pacing."""
    if config.pacing not in _PACINGS:
        raise RecipeError(
            f"no pacing is called '{config.pacing}'{nearest(config.pacing, _PACINGS)}",
            fix=f"one of: {', '.join(pacings())}",
        )
    return config.start + (1.0 - config.start) * _PACINGS[config.pacing](min(1.0, at / config.until))
