"""A run's report as the tables of README.md: python benchmarks/ladder.py runs/lfm_small [--json]

Prints Markdown: the ladder, the gates, seconds of each stage, and the machine and date they belong to; with --json the
same cells as one object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = (
    "artefact",
    "NLL",
    "bits/byte",
    "KL to teacher",
    "KL to parent",
    "prefill tok/s",
    "decode tok/s",
    "peak MB",
    "MB",
)


def number(value: float | None, spec: str, scale: float = 1.0) -> str:
    """`value` by a format, nothing where it was not measured."""
    return "" if value is None else format(value * scale, spec)


def ladder_row(row: dict[str, Any]) -> list[str]:
    """The cells of one subject."""
    kl_to_parent, wider = row["kl_to_parent"], row["fallback_share"]
    return [
        row["name"] + (f" ({wider:.0%} in wider types)" if wider else ""),
        number(row["nll"], ".3f"),
        number(row["bits_per_byte"], ".3f"),
        number(row["kl_to_teacher"], ".3f"),
        number(kl_to_parent, ".1e" if kl_to_parent is not None and kl_to_parent < 1e-3 else ".3f"),
        number(row["prefill_tps"], ",.0f"),
        number(row["decode_tps"], ",.0f"),
        number(row["peak_rss_bytes"], ",.0f", 1e-6),
        number(row["file_bytes"], ",.0f", 1e-6),
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def gate_row(gate: dict[str, Any]) -> list[str]:
    """A promise, its limit, what was measured, whether it held; of speeds the median of the rounds' ratios."""
    measured, limit = f"{gate['measured']:.4g}", f"{gate['limit']:.4g}"
    if gate["quartiles"]:
        low, high = gate["quartiles"]
        measured, limit = f"{measured}× (quartiles {low:.3f}–{high:.3f})", f"{limit}×"
    return [gate["gate"], limit, measured, "yes" if gate["passed"] else "no"]


def pair_row(pair: dict[str, Any]) -> list[str]:
    """A student against a baseline on the same predictions, and what the two trainings do not share."""
    error = "" if pair["nll_se"] is None else f" ± {pair['nll_se']:.4f}"
    return [pair["student"], pair["baseline"], f"{pair['nll']:+.4f}{error}", ", ".join(pair["differs"]) or "nothing"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    report = json.loads((arguments.run / "report.json").read_text())
    if arguments.json:
        ladder = [dict(zip(COLUMNS, ladder_row(row), strict=True)) for row in report["ladder"]]
        print(
            json.dumps(
                {"ladder": ladder, "gates": report["gates"], "pairs": report["pairs"], "stages": report["stages"]}
            )
        )
        return
    machine = report["hardware"]
    memory = machine["memory_bytes"] / 1e9
    print(f"{machine['processor']}, {machine['threads']} threads, {memory:.0f} GB, {report['date'][:10]}.\n")
    print(table(COLUMNS, map(ladder_row, report["ladder"])), "\n")
    print(table(("gate", "limit", "measured", "holds"), map(gate_row, report["gates"])), "\n")
    if report["pairs"]:
        print(table(("student", "baseline", "NLL, nats a token", "unequal in"), map(pair_row, report["pairs"])), "\n")
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    print(table(("stage", "seconds"), [(name, f"{spent:.0f}") for name, spent in seconds.items()]))
    print(f"\n{sum(seconds.values()) / 60:.1f} minutes in all.")


if __name__ == "__main__":
    main()
