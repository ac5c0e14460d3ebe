"""The search's Pareto front on the page: every candidate that was tried, by its loss and its time a token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill.evaluation.charts import Series, chart

FILE = "search.json"
OVER, WITHIN, FRONT, FINALISTS, WINNER = "over budget", "within budget", "front", "finalists", "chosen"


def search_of(run_dir: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """For report.json: what the last search stage of this run tried and chose; None where there is none."""
    names = [f"[0-9]*-{stage['fingerprint'][:12]}/out/{FILE}" for stage in stages]
    found = [path for name in names for path in run_dir.glob(name)]
    if not found:
        return None
    record = json.loads(found[-1].read_text(encoding="utf-8"))
    finalists = [one["digest"] for one in record["finalists"]]
    points = [
        {
            "decode_ms": one["predicted"]["decode_ms"],
            "kd": one["loss"]["kd"],
            "role": _role(one, record["winner"], finalists, record["front"]),
        }
        for one in {one["digest"]: one for one in record["candidates"]}.values()
    ]
    return {
        "method": record["method"],
        "budgets": record["budgets"],
        "tried": len(points),
        "feasible": sum(one["role"] != OVER for one in points),
        "hypervolume": {each["name"]: each["hypervolume"] for each in record["sub_spaces"]},
        "points": points,
    }


def _role(one: Mapping[str, Any], winner: str, finalists: Sequence[str], front: Sequence[str]) -> str:
    if one["digest"] == winner:
        return WINNER
    if one["digest"] in finalists:
        return FINALISTS
    if one["digest"] in front:
        return FRONT
    return WITHIN if one["feasible"] else OVER


def front_chart(search: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    """The chart and its legend; empty where nothing was searched."""
    series = []
    for role in (OVER, WITHIN, FRONT, FINALISTS, WINNER):
        points = [(one["decode_ms"], one["kd"]) for one in (search or {"points": []})["points"] if one["role"] == role]
        if points:
            series.append(Series(role, points, [role if role == WINNER else ""] * len(points)))
    drawn = chart(series, "decode, ms/token  (left is faster)", "held-out distillation loss, nats", lines=False)
    return drawn, [one.name for one in series]
