"""What is asked of `lmdistill recommend`, and what a budget may look like."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import LmdistillError

UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "tok": 1.0, "ktok": 1e3, "mtok": 1e6}
TOKENS = ("tok", "ktok", "mtok")
BUDGET = re.compile(r"(?P<count>\d+(\.\d+)?)\s*(?P<unit>[a-z]*)")


@dataclass(frozen=True)
class Budget:
    """How much a sweep may cost: seconds of this machine, or tokens trained on, all trials together."""

    text: str
    seconds: float | None = None
    tokens: int | None = None


def parse_budget(text: str) -> Budget:
    """`90s`, `10m`, `2h` or `200ktok`; LmdistillError for anything else."""
    found = BUDGET.fullmatch(text.strip().lower())
    if found is None or found["unit"] not in UNITS or float(found["count"]) == 0:
        raise LmdistillError(
            f"--budget {text} is no budget",
            why="a number needs its unit: 10 minutes or 10 million tokens are far apart",
            fix="time as 90s, 10m or 2h; or tokens to train on, in all trials together, as 200ktok or 2mtok",
        )
    count = float(found["count"]) * UNITS[found["unit"]]
    return Budget(text, tokens=round(count)) if found["unit"] in TOKENS else Budget(text, seconds=count)


def asset(option: str, source: str) -> AssetSpec:
    """The asset that an option names; LmdistillError with the grammar where it names none."""
    try:
        return AssetSpec(source=source)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise LmdistillError(f"{option} {source!r} names nothing that can be read", why=why) from error


@dataclass(frozen=True)
class Request:
    """One call."""

    sources: tuple[str, ...]
    teacher: str
    out: Path  # the recipe to write
    work: Path  # samples, caches, students and the study, kept
    budget: Budget
    field: str | None = None  # of a record, with its text; None: found out
    messages: str | None = None  # of a record, with its conversation
    depths: tuple[int, ...] = ()  # layers to try; empty: chosen by the teacher's
    trials: int = 10
    sweep: bool = True
    seed: int = 0
    sample_tokens: int = 16_384  # that the teacher reads to measure the data
    sample_records: int = 4_000  # of each source that are looked at
    device: str = "auto"


def check(request: Request) -> None:
    """Raise LmdistillError for what can be known to be wrong before anything is read."""
    if not request.sources:
        raise LmdistillError("there is no data", fix="name a file or data set: lmdistill recommend data.jsonl …")
    if request.field is not None and request.messages is not None:
        raise LmdistillError("--text and --messages both name the field to read", fix="name one of them")
    if request.sweep and request.trials < 2:
        raise LmdistillError(
            f"--trials {request.trials} leaves nothing to compare", fix="at least 2, or --no-sweep for rules alone"
        )
    for source in request.sources:
        asset("data", source)
    asset("--teacher", request.teacher)
    if request.out.exists():
        raise LmdistillError(
            f"{request.out} is there already", fix="name another file with --out, or move that one away"
        )
