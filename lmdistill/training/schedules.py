"""λ and τ over a training run: where they go, in what shape, and between which steps.

A shape is one decorated function: the share of the way that is behind at a share of the span. Nothing is drawn and
nothing is kept: the value at a step is a function of the step, so that a resumed run has the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmdistill.errors import RecipeError, nearest

Share = Annotated[float, Field(ge=0, le=1)]
Shape = Callable[[float], float]

_SHAPES: dict[str, Shape] = {}


def shape(name: str) -> Callable[[Shape], Shape]:
    """Register a function from the share of the span to the share of the way, 0 at 0 and 1 at 1 unless it stays."""

    def register(function: Shape) -> Shape:
        _SHAPES[name] = function
        return function

    return register


def shapes() -> dict[str, str]:
    """All shapes by name, with what they do."""
    return {name: (function.__doc__ or "").strip() for name, function in sorted(_SHAPES.items())}


@shape("constant")
def constant(at: float) -> float:
    """Stays where it is: a schedule that a recipe laid over this one can switch off."""
    return 0.0


@shape("linear")
def linear(at: float) -> float:
    """The same distance at every step."""
    return at


@shape("cosine")
def cosine(at: float) -> float:
    """Slow at both ends: half a period of a cosine."""
    return 0.5 - 0.5 * math.cos(math.pi * at)


@shape("step")
def step(at: float) -> float:
    """All at once, in the middle of the span."""
    return float(at >= 0.5)


class Change(BaseModel):
    """From the key's own value to another one in the course of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    to: float = Field(description="the value at the end of the span, and after it")
    shape: str = Field(default="linear", description="how it gets there, by name, see below")
    after: Share = Field(default=0.0, description="share of the steps at which the span begins")
    until: Share = Field(default=1.0, description="share of the steps at which it ends")

    @model_validator(mode="after")
    def _span_is_one(self) -> Change:
        if self.after > self.until:
            raise ValueError(f"after {self.after} is later than until {self.until}")
        return self


class WeightChange(Change):
    """Of λ."""

    to: Share = Field(description="λ at the end of the span, and after it")


class TemperatureChange(Change):
    """Of τ."""

    to: Annotated[float, Field(gt=0)] = Field(description="τ at the end of the span, and after it")


def find_shape(name: str) -> Shape:
    """The shape called `name`; RecipeError with the nearest name where there is none."""
    if name in _SHAPES:
        return _SHAPES[name]
    raise RecipeError(
        f"no shape of a schedule is called '{name}'{nearest(name, _SHAPES)}", fix=f"one of: {', '.join(shapes())}"
    )


def value_at(start: float, change: Change | None, step: int, steps: int) -> float:
    """The value in step `step` (from 0) of `steps`: `start` before the span, `change.to` after it."""
    if change is None:
        return start
    at, span = step / max(1, steps - 1), change.until - change.after
    share = min(1.0, max(0.0, (at - change.after) / span)) if span else float(at >= change.until)
    way = find_shape(change.shape)(share)
    return start if way == 0.0 else change.to if way == 1.0 else start + way * (change.to - start)


def scheduled(config: Any, step: int, steps: int) -> dict[str, float]:
    """The keys of a `DistillConfig` that change in training, with their values in step `step` of `steps`."""
    changes = {"kd_weight": config.kd_weight_schedule, "temperature": config.temperature_schedule}
    return {
        key: round(value_at(getattr(config, key), change, step, steps), 6)
        for key, change in changes.items()
        if change is not None
    }
