"""Budgets of a student on its device: `decode_tps >= 50`, `ttft_ms <= 400`, `decode >= 2.0x teacher`.

| metric | what | relative form |
|---|---|---|
| `decode_tps` | tokens generated a second | `decode >= 2.0x teacher` |
| `ttft_ms` | to the first token after the shortest prompt timed | `ttft <= 0.5x teacher` |
| `ttft_ms@2048` | the same after 2,048 tokens | `ttft@2048 <= 0.5x teacher` |
| `ram_mb` | the most megabytes (10⁶) the process has held | `ram <= 0.7x teacher` |
| `file_mb` | megabytes of the file | `file <= 0.5x teacher` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from lmdistill.errors import nearest

Metric = Literal["decode_tps", "ttft_ms", "ram_mb", "file_mb"]
Figures = Mapping[str, float]  # value of each metric, by `Budget.figure`

_UNITS: dict[str, Metric] = {"decode": "decode_tps", "ttft": "ttft_ms", "ram": "ram_mb", "file": "file_mb"}
_HIGHER_IS_BETTER: tuple[Metric, ...] = ("decode_tps",)
_NUMBER = r"(\d+(?:\.\d+)?(?:e\d+)?)"
_ABSOLUTE = re.compile(rf"(\w+?)(?:@(\d+))?\s*(<=|>=)\s*{_NUMBER}")
_RELATIVE = re.compile(rf"(\w+?)(?:@(\d+))?\s*(<=|>=)\s*{_NUMBER}\s*x\s*teacher")


@dataclass(frozen=True)
class Budget:
    """One bound on one metric; a relative one is in units of the teacher's figure on the same device."""

    metric: Metric
    bound: float
    relative: bool = False
    prompt: int | None = None  # tokens read before the first one, for ttft_ms

    @property
    def at_least(self) -> bool:
        """Whether the bound is from below."""
        return self.metric in _HIGHER_IS_BETTER

    @property
    def figure(self) -> str:
        """The name of the figure it bounds: `ttft_ms@2048`."""
        return self.metric if self.prompt is None else f"{self.metric}@{self.prompt}"

    def limit(self, teacher: Figures | None) -> float:
        """The bound in the metric's unit; `teacher` is needed for a relative one."""
        if not self.relative:
            return self.bound
        assert teacher is not None, "a budget relative to the teacher needs the teacher's figures"
        return self.bound * teacher[self.figure]

    def violation(self, figures: Figures, teacher: Figures | None = None) -> float:
        """By what share of the limit it is missed; negative or 0 where it is met."""
        limit, value = self.limit(teacher), figures[self.figure]
        return (limit - value) / limit if self.at_least else (value - limit) / limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        at = "" if self.prompt is None else f"@{self.prompt}"
        if self.relative:
            return f"{self.metric.rpartition('_')[0]}{at} {sign} {self.bound:g}x teacher"
        return f"{self.metric}{at} {sign} {self.bound:g}"


def parse(text: str) -> Budget:
    """The budget that a recipe's line says; raises ValueError with what can be said instead."""
    relative = _RELATIVE.fullmatch(text.strip())
    found = relative or _ABSOLUTE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is no budget; write e.g. 'decode_tps >= 50' or 'decode >= 2.0x teacher'")
    name, prompt, sign, number = found.groups()
    known = list(_UNITS) if relative else list(_UNITS.values())
    if name not in known:
        other = " (in units of the teacher: without its unit)" if relative and name in _UNITS.values() else ""
        raise ValueError(f"'{text}': no figure '{name}'{other}; there are {', '.join(known)}{nearest(name, known)}")
    metric = next(metric for short, metric in _UNITS.items() if name in (short, metric))
    if prompt is not None and metric != "ttft_ms":
        raise ValueError(f"'{text}': only ttft_ms depends on a prompt")
    if (sign == ">=") != (metric in _HIGHER_IS_BETTER):
        raise ValueError(f"'{text}': {metric} is better when {'higher' if sign == '<=' else 'lower'}: turn the sign")
    if float(number) == 0:
        raise ValueError(f"'{text}': a budget of 0 bounds nothing")
    return Budget(metric, float(number), relative is not None, None if prompt is None else int(prompt))


def _checked(text: str) -> str:
    parse(text)
    return text


BudgetText = Annotated[str, AfterValidator(_checked)]


def violations(budgets: Sequence[Budget], figures: Figures, teacher: Figures | None = None) -> list[float]:
    """`violation` of each budget, in order: constraints that are met where they are ≤ 0."""
    return [budget.violation(figures, teacher) for budget in budgets]
