"""report.html: one self-contained page, drawn from report.json's contents alone."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill.evaluation.charts import COLOURS, Series, chart
from lmdistill.evaluation.ladder import TEACHER
from lmdistill.evaluation.search_front import front_chart
from lmdistill.pipeline.display import duration, size

FOLDER = Path(__file__).parent
NONE = "–"

Row = Mapping[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` decimals; a dash where it was not measured."""
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", "−")


def small(value: float | None) -> str:
    """A divergence: decimals where it is large, powers of ten where it is tiny."""
    if value is None:
        return NONE
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("-", "−")


def count(value: float | None) -> str:
    """A count with thousands marked."""
    return NONE if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Tokens a second: three digits are as many as repeat."""
    return NONE if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def times(value: float | None) -> str:
    """A ratio."""
    return "" if value is None else f"{value:.2f}×"


def ratio(row: Row | None, other: Row | None, figure: str) -> float | None:
    """One row's figure over another's, of what was timed in rounds the median of theirs; None where either is missing.

    As gates compare them (`gates.judge`), so that the page and the gates name one number.
    """
    if row is None or other is None or row is other or not row.get(figure) or not other.get(figure):
        return None
    one, two = (side.get("spreads", {}).get(figure, {}).get("rounds", ()) for side in (row, other))
    if len(one) > 1 and len(one) == len(two):
        return float(statistics.median(x / y for x, y in zip(one, two, strict=True)))
    return float(row[figure]) / float(other[figure])


def counterpart(row: Row, ladder: Sequence[Row]) -> Row | None:
    """The teacher's file of the same format as `row`; for a checkpoint the teacher itself."""
    if row["role"] != "file":
        return ladder[0] if row["name"] != TEACHER else None
    same = (one for one in ladder if one["role"] == "file" and one["parent"] == TEACHER)
    return next((one for one in same if one["format"] == row["format"]), None)


def headline(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last student that has files (else the last one), its smallest file with a teacher's beside it, its gains."""
    ladder = report["ladder"]
    parents = {row["parent"] for row in ladder if row["role"] == "file"}
    students = [row for row in ladder if row["role"] == "student"]
    if not students:
        return None
    student = ([row for row in students if row["name"] in parents] or students)[-1]
    files = [row for row in ladder if row["parent"] == student["name"] and counterpart(row, ladder)]
    file = min(files, key=lambda row: row["file_bytes"], default=None)
    return {
        "student": student,
        "teacher": ladder[0],
        "file": file,
        "teacher_file": counterpart(file, ladder) if file else None,
        "pairs": [pair for pair in report["pairs"] if pair["student"] == student["name"]],
    }


def speed_chart(ladder: Sequence[Row]) -> tuple[Any, list[str]]:
    """Quality against decoding speed of every timed file, one colour a parent; the chart and its legend."""
    timed = [row for row in ladder if row["role"] == "file" and row["decode_tps"] is not None]
    families = list(dict.fromkeys(row["parent"] for row in timed))
    series = []
    for family in families:
        rows = [row for row in timed if row["parent"] == family]
        series.append(
            Series(family, [(row["decode_tps"], row["nll"]) for row in rows], [row["format"] for row in rows])
        )
    return chart(
        series, "decode, tokens/s  (right is faster)", "NLL, nats/token  (low is better)", lines=False
    ), families


def loss_chart(curves: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str], bool]:
    """Every training's curve against tokens seen, the legend, and whether the curves are of one quantity.

    That is the cross-entropy on the training text where each training has logged it, else its own loss.
    """
    shared = all("ce" in point for one in curves for point in one["points"])
    figure = "ce" if shared else "loss"
    series = [
        Series(one["name"], [(point["tokens"] / 1e3, point[figure]) for point in one["points"]]) for one in curves
    ]
    label = "cross-entropy, nats/token" if shared else "training loss, nats"
    return chart(series, "tokens seen, thousands", label, lines=True), [one.name for one in series], shared


def commands(report: Mapping[str, Any], run_dir: str) -> dict[str, str]:
    """The command that makes each part of the page."""
    again = f"lmdistill pipeline {shlex.quote(f'{run_dir}/recipe.lock.yaml')}"
    if run_dir != f"runs/{report['recipe']}":
        again += f" --run-dir {shlex.quote(run_dir)}"
    cache = shlex.quote(f"{run_dir}/{report['signals']['folder']}") if report["signals"] else ""
    return {
        "run": again,
        "evaluate": f"{again} --force {shlex.quote(report['evaluate'])}",
        "cache": f"lmdistill cache info {cache}",
    }


def render(report: Mapping[str, Any], run_dir: str) -> str:
    """The page. Every text of the report is escaped; nothing is fetched from anywhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (number, signed, small, count, rate, size, duration, times):
        environment.filters[function.__name__] = function
    ladder = report["ladder"]
    quality_speed, families = speed_chart(ladder)
    losses, trainings, comparable = loss_chart(report["curves"])
    search, roles = front_chart(report["search"])
    others = {row["name"]: counterpart(row, ladder) for row in ladder}
    spent = sum(stage["seconds"] or 0 for stage in report["stages"])
    return environment.get_template("report.html.jinja").render(
        report=report,
        head=headline(report),
        ratio=lambda row, figure: ratio(row, others[row["name"]], figure),
        between=ratio,
        quality_speed=quality_speed,
        families=families,
        losses=losses,
        trainings=trainings,
        comparable=comparable,
        search=search,
        roles=roles,
        colours=COLOURS,
        commands=commands(report, run_dir),
        seconds=spent,
        longest=max((stage["seconds"] or 0 for stage in report["stages"]), default=0) or 1,
        css=(FOLDER / "report.css").read_text(encoding="utf-8"),
    )
