"""Quality gates: promises about the ladder; a run whose report breaks one ends as a failure, report and all.

    gates:
      - {of: distill, metric: nll, at_most: {of: ce}}                              # another row's same metric
      - {of: distill, metric: nll, at_most: {of: teacher, plus: 0.7}}
      - {of: export/q4_0, metric: prefill_tps, at_least: {of: teacher_files/q4_0, times: 1.5}}
      - {of: export/f32, metric: kl_to_parent, at_most: 1.0e-6}                    # a number

The limit is `value`, or the other row's figure × `times` + `plus`. Speeds that were measured in the same rounds are
compared round by round: what slows one round down slows both files, and the median of the ratios has to reach `times`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmdistill.errors import StageError, nearest

QUALITY = ("nll", "bits_per_byte")
COMPARED = ("kl_to_teacher", "kl_to_parent", "top1_to_parent")
SPEED = ("prefill_tps", "decode_tps", "peak_rss_bytes")
METRICS = (*QUALITY, *COMPARED, *SPEED, "file_bytes", "params")


def _known_metric(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"no metric '{metric}'{nearest(metric, METRICS)}; there are {', '.join(METRICS)}")
    return metric


class Bound(BaseModel):
    """A limit: a number, or another row's figure, scaled and shifted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | None = Field(default=None, allow_inf_nan=False, description="the limit itself")
    of: str | None = Field(default=None, description="the ladder row whose figure sets the limit")
    metric: str | None = Field(default=None, description="which figure of that row; the gate's own by default")
    times: float = Field(default=1.0, allow_inf_nan=False, description="that figure is multiplied by this")
    plus: float = Field(default=0.0, allow_inf_nan=False, description="and this is added")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, given: Any) -> Any:
        return {"value": given} if isinstance(given, int | float) and not isinstance(given, bool) else given

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str | None) -> str | None:
        return metric if metric is None else _known_metric(metric)

    @model_validator(mode="after")
    def _one_form(self) -> Bound:
        if (self.value is None) == (self.of is None):
            raise ValueError("a limit is a number or has `of`, the name of a ladder row")
        return self

    def render(self, metric: str) -> str:
        """The limit as people write it."""
        if self.of is None:
            return f"{self.value:g}"
        text = f"{self.of} {self.metric or metric}"
        text += f" × {self.times:g}" if self.times != 1 else ""
        return text + (f" {'+' if self.plus > 0 else '−'} {abs(self.plus):g}" if self.plus else "")


class Gate(BaseModel):
    """One promise about one figure of one ladder row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: str = Field(description="the ladder row: a stage's name, `teacher`, or `<export stage>/<format>`")
    metric: str = Field(description="which figure, as report.json names it")
    at_most: Bound | None = Field(default=None, description="the figure must not be above this")
    at_least: Bound | None = Field(default=None, description="the figure must not be below this")

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str) -> str:
        return _known_metric(metric)

    @model_validator(mode="after")
    def _one_bound(self) -> Gate:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a gate has `at_most` or `at_least`, one of them")
        return self

    @property
    def sense(self) -> Literal["≤", "≥"]:
        """Which side of the limit is good."""
        return "≤" if self.at_most is not None else "≥"

    @property
    def bound(self) -> Bound:
        """The limit, whichever side."""
        bound = self.at_most if self.at_most is not None else self.at_least
        assert bound is not None
        return bound

    @property
    def rows(self) -> tuple[str, ...]:
        """The ladder rows that this gate reads."""
        return (self.of,) if self.bound.of is None else (self.of, self.bound.of)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures that this gate reads."""
        return (self.metric, self.bound.metric or self.metric)

    def render(self) -> str:
        """The promise in one line."""
        return f"{self.of} {self.metric} {self.sense} {self.bound.render(self.metric)}"


@dataclass(frozen=True)
class GateResult:
    """What became of a gate."""

    gate: str
    measured: float | None  # None: not measured
    limit: float | None
    passed: bool
    quartiles: tuple[float, float] | None = None  # of `measured`, where it is the median of rounds' ratios

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    def shown(self) -> str:
        """Measured and limit in words; of rounds their ratio, with its quartiles."""
        measured, limit = ("not measured" if x is None else f"{x:.6g}" for x in (self.measured, self.limit))
        if self.quartiles is None:
            return f"measured {measured}, limit {limit}"
        low, high = self.quartiles
        return f"measured {measured} times (quartiles {low:.4g} to {high:.4g} of the rounds), limit {limit}"


def check(gates: Sequence[Gate], ladder: Sequence[Mapping[str, Any]]) -> list[GateResult]:
    """Hold every gate against the measured ladder; a figure that is missing or not a number keeps no promise.

    A row may carry `rounds`: figure → its measurements, in the order of the rounds that all rows were measured in.
    """
    rows = {row["name"]: row for row in ladder}
    return [_by_rounds(gate, rows) or _by_figure(gate, rows) for gate in gates]


def _by_figure(gate: Gate, rows: Mapping[str, Mapping[str, Any]]) -> GateResult:
    def figure(name: str, metric: str) -> float | None:
        value = rows.get(name, {}).get(metric)
        return None if value is None or not math.isfinite(value) else float(value)

    bound, measured = gate.bound, figure(gate.of, gate.metric)
    limit = bound.value
    if bound.of is not None:
        other = figure(bound.of, bound.metric or gate.metric)
        limit = None if other is None else other * bound.times + bound.plus
    return GateResult(gate.render(), measured, limit, _kept(gate, measured, limit))


def _by_rounds(gate: Gate, rows: Mapping[str, Mapping[str, Any]]) -> GateResult | None:
    """The median of the rounds' ratios against `times`; None where the two were not measured in the same rounds."""
    bound = gate.bound
    if bound.of is None or bound.plus:
        return None
    one, other = (
        rows.get(name, {}).get("rounds", {}).get(metric, ())
        for name, metric in zip((gate.of, bound.of), (gate.metrics[0], gate.metrics[-1]), strict=True)
    )
    if len(one) < 2 or len(one) != len(other):
        return None
    low, middle, high = statistics.quantiles([x / y for x, y in zip(one, other, strict=True)], method="inclusive")
    return GateResult(gate.render(), middle, bound.times, _kept(gate, middle, bound.times), (low, high))


def _kept(gate: Gate, measured: float | None, limit: float | None) -> bool:
    if measured is None or limit is None:
        return False
    return measured <= limit if gate.sense == "≤" else measured >= limit


def demand(failed: Sequence[GateResult], page: Path) -> None:
    """Raise StageError that lists the gates that were not kept; `page` is where the whole report is."""
    if not failed:
        return

    width = max(len(result.gate) for result in failed)
    table = "\n".join(f"    {result.gate:<{width}}  {result.shown()}" for result in failed)
    raise StageError(
        f"{len(failed)} quality gate{'s' if len(failed) > 1 else ''} of the recipe failed",
        why=f"measured on the held-out text and on this machine\n{table}",
        fix=f"read {page}; train longer or change the student, or change `gates` if the promise was wrong. Speeds are "
        "measured beside whatever else runs: `--force evaluate` on an idle machine measures them again",
    )
