"""evaluation.json: everything that evaluate found, in one file; the report is drawn from it alone."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Artefact

FORMAT_VERSION = 1
FILE = "evaluation.json"
MAX_POINTS = 400  # of a loss curve: more cannot be seen
CURVE_KEYS = ("step", "tokens", "loss", "ce")
TIMED = ("prefill_tps", "decode_tps")
DISTRIBUTIONS = ("lmdistill", "torch", "transformers", "llama-cpp-python", "gguf", "numpy", "tokenizers")


def measured_ladder(ladder: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with their median speeds and peak memory; None where a row was not timed."""
    rows = []
    for row in ladder:
        timed = speed.get(row["name"], {})
        medians = {figure: timed[figure]["median"] if timed else None for figure in TIMED}
        rows.append({**row, **medians, "peak_rss_bytes": timed.get("peak_rss_bytes")})
    return rows


def with_rounds(rows: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with each timed figure's measurements, as gates compare them."""
    return [
        {**row, "rounds": {figure: speed[row["name"]][figure]["rounds"] for figure in TIMED if row["name"] in speed}}
        for row in rows
    ]


def curves(models: Sequence[Artefact]) -> list[dict[str, Any]]:
    """Loss curves of the models' trainings, thinned to what a chart can show."""
    found = []
    for model in models:
        record = model.out / "training.json"
        log = json.loads(record.read_text()).get("log", []) if record.exists() else []
        points = [{key: entry[key] for key in CURVE_KEYS if key in entry} for entry in log if "loss" in entry]
        stride = -(-len(points) // MAX_POINTS) or 1
        if points:
            thinned = points[::stride] if points[-1] in points[::stride] else [*points[::stride], points[-1]]
            found.append({"name": model.name, "points": thinned})
    return found


def cache_figures(signals: Artefact | None) -> dict[str, Any] | None:
    """The teacher cache's own figures; None where the recipe has no cache."""
    if signals is None:
        return None
    from lmdistill.signals.inspect import describe

    facts = describe(signals.out)
    statistics: dict[str, dict[str, Any]] = {name: split["statistics"] for name, split in facts["splits"].items()}
    first = statistics.get("train") or next(iter(statistics.values()))
    return {
        "bytes_per_token": facts["bytes_per_token"],
        "k": facts["k"],
        "head_mass": first.get("head_mass"),
        "teacher_nll": first.get("teacher_nll"),
        "statistics": statistics,
        "proof": signals.metrics.get("parity"),
        "folder": signals.path.name,
    }


def environment(threads: int) -> dict[str, Any]:
    """Where and with what the figures were measured."""
    import psutil

    from lmdistill.pipeline.environment import processor
    from lmdistill.pipeline.keys import tool_versions

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "processor": processor(),
            "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
            "threads": threads,
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version(), **tool_versions(DISTRIBUTIONS)},
    }


def write(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write evaluation.json into `folder` and return its path."""
    path = folder / FILE
    write_json(path, {"format": FORMAT_VERSION, **record})
    return path
