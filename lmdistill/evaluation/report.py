"""report.json and report.html of a run folder: the measured ladder joined with what only the pipeline knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill.evaluation.record import FILE, measured_ladder
from lmdistill.pipeline.files import write_json, write_text

SPREADS = ("prefill_tps", "decode_tps")
STAGE_KEYS = ("name", "fingerprint", "seconds", "tokens", "cached")


def find_evaluation(run_dir: Path, stages: Sequence[Mapping[str, Any]]) -> Path | None:
    """evaluation.json of the run's last evaluate stage, else the newest in the folder; None where there is none."""
    for stage in reversed(stages):
        fingerprint = str(stage.get("fingerprint") or "")[:12]
        found = sorted(run_dir.glob(f"[0-9]*-{fingerprint}/out/{FILE}")) if fingerprint else []
        if found:
            return found[0]
    newest = sorted(run_dir.glob(f"[0-9]*/out/{FILE}"), key=lambda path: path.stat().st_mtime_ns)
    return newest[-1] if newest else None


def build(name: str, evaluation: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of report.json."""
    quality, speed = evaluation["quality"], evaluation["speed"]
    rows = measured_ladder(quality["ladder"], speed["rows"])
    for row in rows:
        timed = speed["rows"].get(row["name"], {})
        row["spreads"] = {figure: timed[figure] for figure in SPREADS if figure in timed}
    return {
        "recipe": name,
        "ladder": rows,
        "stages": [{key: stage.get(key) for key in STAGE_KEYS} for stage in stages],
        "signals": evaluation["signals"],
        "gates": evaluation["gates"],
        "pairs": quality["pairs"],
        "curves": evaluation["curves"],
        "text": {key: quality[key] for key in ("split", "rows", "sequence_length", "predictions", "bytes")},
        "benchmark": {key: speed[key] for key in ("prefill", "decode", "repeats", "threads")},
        "evaluate": evaluation["name"],
        **evaluation["environment"],
    }


def refresh(run_dir: Path, stages: Sequence[Mapping[str, Any]]) -> None:
    """Write report.json and report.html at the top of `run_dir`; nothing where no evaluate stage has finished.

    `stages`: name, fingerprint, seconds, tokens and cached of every stage of this run, in order.
    """
    found = find_evaluation(run_dir, stages)
    if found is None:
        return
    from lmdistill.evaluation.page import render

    report = build(run_dir.resolve().name, json.loads(found.read_text(encoding="utf-8")), stages)
    write_json(run_dir / "report.json", report)
    write_text(run_dir / "report.html", render(report, str(run_dir)))
