"""What the benchmarks found, each figure beside its goal, in one table: python benchmarks/figures.py [--json]

Writes it into benchmarks/README.md, between its two marks, from the files in benchmarks/results/: nothing is measured
here. A benchmark that has not been run yet has no rows. --json prints the table's cells as one object instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ladder import table
from quality_page import README, write_between

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
COLUMNS = ("figure", "measured", "goal", "reached")
Cells = tuple[str, str, str, str]


def cells(figure: str, value: float | None, goal: float, sense: str, spec: str) -> Cells:
    """One row; a figure that could not be measured reaches nothing."""
    if value is None:
        return figure, "not measured", f"{sense} {goal:{spec}}", "no"
    reached = value <= goal if sense == "≤" else value >= goal
    return figure, f"{value:{spec}}", f"{sense} {goal:{spec}}", "yes" if reached else "no"


def loss_rows(result: dict[str, Any]) -> Iterator[Cells]:
    """Time, memory and exactness of the fused loss, and what its rivals take."""
    for vocab, one in ((name, one) for name, one in result.items() if name != "measured"):
        at = f"V = {int(vocab):,}: "
        yield cells(at + "KD step over cross-entropy step, time", one["kd_over_ce_time"], 1.05, "≤", ".3f")
        yield cells(at + "fused over naive, peak memory", one["fused_over_naive_peak"], 0.2, "≤", ".3f")
        yield cells(at + "gradient against float64", one["grad_error"], 1e-5, "≤", ".1e")
        for rival, found in one["rivals"].items():
            for figure in ("time_ratio", "peak_ratio"):
                if found[figure] is not None:
                    what = f"{at}{figure.removesuffix('_ratio')} over {rival}'s"
                    yield cells(what, found[figure], 1.0, "≤", ".3f")


def signals_rows(result: dict[str, Any]) -> Iterator[Cells]:
    """Size, exactness and speed of the teacher cache, and what capturing costs."""
    for variant, size, pace in (("mmap", 104, 5e6), ("compact", 64, 5e5)):
        one = result[variant]
        yield cells(f"{variant}: bytes a token at K = 32", one["bytes_per_token"], size, "≤", ".1f")
        yield cells(f"{variant}: p99 KL, nats", one["kl_p99"], 1e-4, "≤", ".1e")
        yield cells(f"{variant}: read, tokens/s of one core", one["read_tps"], pace, "≥", ",.0f")
    for engine, share in result["capture"].items():
        yield cells(f"capture over bare forward, {engine}", share, 0.95, "≥", ".3f")


def train_rows(result: dict[str, Any]) -> Iterator[Cells]:
    """Training from the cache against the live teacher."""
    goal = result["flops_bound"]
    yield cells("distill over TRL's GKDTrainer, tokens/s", result["ratio"], goal, "≥", ".2f")


def robustness_rows(result: dict[str, Any]) -> Iterator[Cells]:
    """What a cache survives."""
    for variant, one in result["variants"].items():
        if "flips" in one:
            flips = one["flips"]
            what = f"{variant}: flipped bytes found and located, of {flips['flips']:,}"
            yield cells(what, flips["located"], flips["flips"], "≥", ",.0f")
        if "kills" in one:
            kills = one["kills"]
            what = f"{variant}: captures with other bytes after {kills['kills']} kill -9, of {kills['captures']}"
            yield cells(what, kills["different"], 0, "≤", ".0f")


def search_rows(result: dict[str, Any]) -> Iterator[Cells]:
    """How well speed is foretold, and what searching brings over chance and over a hand-made student."""
    latency, ratio = result["latency"], result["hypervolume_ratio"]
    searched, hand_made = result["searched"] or {}, result["hand_made"] or {}
    yield cells("decode latency of held-out shapes, Spearman", latency["spearman"], 0.98, "≥", ".3f")
    yield cells("decode latency of held-out shapes, median error", latency["median_rel_error"], 0.05, "≤", ".3f")
    yield cells("hypervolume over that of random candidates, at equal tokens", ratio, 1.2, "≥", ".2f")
    ranked, fresh = (result.get("measured", {}).get(piece) for piece in ("ranked", "fresh"))
    if ranked:
        yield cells("the same over random shapes on the search's own blocks", ranked["ratio"], 1.0, "≥", ".2f")
    if fresh:
        what = "searched against hand-made student on text never looked at, nll"
        yield cells(what, fresh["searched"]["nll"], fresh["hand_made"]["nll"], "≤", ".3f")
    for figure, sense, spec in (("nll", "≤", ".3f"), ("decode_tps", "≥", ".1f"), ("ttft_ms", "≤", ".1f")):
        if hand_made.get(figure) is not None:
            what = f"searched against hand-made student, {figure}"
            yield cells(what, searched.get(figure), hand_made[figure], sense, spec)


def quantize_rows(result: dict[str, Any]) -> Iterator[Cells]:
    """Whether files hold the trained weights, what training on a grid wins back, and what programs compute."""
    for model, ways in result["by_model"].items():
        for way in (way for way in ("Q4_0", "Q8_0", "8da4w") if way in ways):
            yield cells(f"{model} on {way}: every tensor bit-equal when packed", ways[way]["bit_equal"], 1, "≥", ".0f")
        if "Q4_0" in ways:
            yield cells(f"{model} on Q4_0: KL won back of the best PTQ", ways["Q4_0"]["recovered"], 0.8, "≥", ".3f")
        if "executorch" in ways:
            one = ways["executorch"]
            yield cells(f"{model} as pte_f32: farthest logit from transformers'", one["fp32_max_abs"], 1e-4, "≤", ".1e")
            least = min(one["delegated"].values())
            yield cells(f"{model} as .pte: compute in XNNPACK, least share", least, 0.95, "≥", ".3f")
            yield cells(f"{model} as .pte: codes and scales read back", one["bit_equal"], 1, "≥", ".0f")


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[Cells]]] = {
    "loss": loss_rows,
    "signals": signals_rows,
    "robustness": robustness_rows,
    "search": search_rows,
    "quantize": quantize_rows,
    "train": train_rows,
}


def rows_of(results: Path) -> dict[str, list[Cells]]:
    """Script → its rows, of the results that are there."""
    found = {name: results / f"{name}.json" for name in ROWS}
    return {name: [*ROWS[name](json.loads(path.read_text()))] for name, path in found.items() if path.exists()}


def section(results: Path) -> str:
    """The page's part: one table, and the command and date of each script."""
    rows = rows_of(results)
    settings = {name: _setting(json.loads((results / f"{name}.json").read_text())) for name in rows}
    body = table(COLUMNS, [row for name in rows for row in rows[name]])
    notes = "\n".join(
        f"- `{one['command']}`: {one['date'][:10]}, {one['hardware']['cpu']}, {one['hardware']['cores']} cores, load "
        f"{one['hardware']['load_1min']:.1f} before it began"
        for one in settings.values()
    )
    return f"{BEGIN}\n{body}\n\n{notes}\n{END}"


def _setting(result: dict[str, Any]) -> dict[str, Any]:
    setting: dict[str, Any] = result.get("measured", result)
    return setting


def main() -> None:
    """Write the page again, or print the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; write nothing")
    args = parser.parse_args()
    if args.json:
        found = rows_of(RESULTS)
        print(json.dumps({name: [dict(zip(COLUMNS, row, strict=True)) for row in found[name]] for name in found}))
    else:
        write_between(README, BEGIN, END, section(RESULTS))


if __name__ == "__main__":
    main()
