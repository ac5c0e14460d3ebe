"""report.json and report.html of a run folder: the measured ladder joined with what only the pipeline knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill.evaluation.gates import GateResult
from lmdistill.evaluation.record import FILE, measured_ladder
from lmdistill.evaluation.search_front import search_of
from lmdistill.pipeline.files import write_json, write_text

SPREADS = ("prefill_tps", "decode_tps")
STAGE_KEYS = ("name", "fingerprint", "seconds", "tokens", "peak_rss_bytes", "cached")


def find_evaluations(run_dir: Path, stages: Sequence[Mapping[str, Any]]) -> list[Path]:
    """evaluation.json of every evaluate stage among `stages`, in order; no other run's."""
    names = [f"[0-9]*-{stage['fingerprint'][:12]}/out/{FILE}" for stage in stages]
    return [path for name in names for path in run_dir.glob(name)]


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


def refresh(run_dir: Path, stages: Sequence[Mapping[str, Any]]) -> list[GateResult]:
    """Write report.json and report.html at the top of `run_dir`; nothing where `stages` has no finished evaluate.

    `stages`: name, fingerprint, seconds, tokens and cached of every stage of this run that has a result, in order.
    The page shows the last evaluate stage; returned are the broken gates of all of them.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in find_evaluations(run_dir, stages)]
    if not found:
        return []
    from lmdistill.evaluation.page import render

    report = build(run_dir.resolve().name, found[-1], stages) | {"search": search_of(run_dir, stages)}
    write_json(run_dir / "report.json", report)
    write_text(run_dir / "report.html", render(report, str(run_dir)))
    results = [GateResult(**gate) for evaluation in found for gate in evaluation["gates"]]
    return [result for result in results if not result.passed]
