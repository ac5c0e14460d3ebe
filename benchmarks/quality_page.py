"""Table and plot of the objectives' quality, from the figures in benchmarks/results/quality.json.

    python benchmarks/quality_page.py [--json]

Writes them into benchmarks/README.md, between its two marks, and benchmarks/results/quality.svg: what
`python benchmarks/quality.py` does at its end. --json prints the table's cells as one object instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ladder import table

from lmdistill.errors import LmdistillError
from lmdistill.evaluation.charts import Series, chart

README = Path(__file__).with_name("README.md")
RESULT = Path(__file__).parent / "results" / "quality.json"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
LABELS = {
    "ce": "cross-entropy, no teacher",
    "full_kl": "full KL, live teacher",
    "topk_renorm": "top 32, renormalised",
    "rest_bucket": "top 32 + rest",
    "decoupled": "decoupled top 32, τ = 1",
    "decoupled_tau2": "decoupled top 32, τ = 2",
    "decoupled_tau4": "decoupled top 32, τ = 4",
    "sampled_12": "sampled, about 12 ids",
    "sampled_32": "sampled, about 32 ids",
    "bd_kd": "BD-KD",
    "full_kl_only": "full KL, λ = 1",
    "decoupled_only": "decoupled top 32, λ = 1",
}
COLUMNS = ("objective", "held-out NLL", "± seeds", "over full KL", "against CE", "± text", "ECE")
# Colours of the report's charts, readable on white and on black.
STYLE = (
    "svg{--c0:#3567b8;--c1:#c4661f;--c2:#2e8b6b;--c3:#8a4fa3;--c4:#a68a00;--c5:#6b7480;font-family:sans-serif}"
    "text{fill:#7d8791;font-size:11px}.label{font-size:12px}.grid{stroke:#7d8791;stroke-opacity:.25}"
    ".axis{stroke:#7d8791}"
)


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's cells, best first."""
    spread = result["measured"]["spread"]
    reference = spread.get("full_kl", {}).get("nll_mean")
    rows = []
    for name, one in sorted(spread.items(), key=lambda item: item[1]["nll_mean"]):
        against, error = one.get("over_ce") or (None, None)
        rows.append(
            [
                LABELS.get(name, name),
                f"{one['nll_mean']:.4f}",
                "" if one["nll_sd"] is None else f"{one['nll_sd']:.4f}",
                "" if reference is None else f"{one['nll_mean'] / reference - 1:+.2%}",
                "" if against is None else f"{against:+.4f}",
                "" if error is None else f"{error:.4f}",
                f"{one['ece_mean']:.4f}",
            ]
        )
    return rows


def plot(result: dict[str, Any]) -> str:
    """An SVG that stands alone: each seed a point, held-out loss against calibration."""
    ways = [name for name in result if name != "measured"]
    series = [
        Series(name, [*zip(one["nll"], one["ece"], strict=True)], [name, *[""] * (len(one["nll"]) - 1)])
        for name, one in ((name, result[name]) for name in ways)
    ]
    drawn = str(chart(series, "held-out NLL, nats a token", "expected calibration error", lines=False))
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="840" height="480"'
    return drawn.replace("<svg", head, 1).replace(">", f"><style>{STYLE}</style>", 1) + "\n"


def section(result: dict[str, Any], picture: str) -> str:
    """The page's part: how it was measured, the table, the plot, what was expected."""
    setting, spread = result["measured"], result["measured"]["spread"]
    student = setting["student"]
    seeds = max(len(result[name]["nll"]) for name in spread)
    text = [
        BEGIN,
        f"`{setting['command']}`: {setting['date'][:10]}, {setting['hardware']['cpu']}, "
        f"{setting['hardware']['cores']} cores.",
        f"One student of {student['parameters'] / 1e6:.0f} M parameters ({len(student['layer_types'])} blocks, grown "
        f"from SmolLM2-135M) at {setting['start_nll']:.3f} nats; {setting['tokens']:,} tokens each, {seeds} orders of "
        f"rows, λ = {setting['kd_weight']:g} where nothing else is said; scored on "
        f"{setting['heldout_predictions']:,} held-out predictions.",
        f"\n{table(COLUMNS, rows_of(result))}\n",
        "± seeds: standard deviation over orders of rows. Against CE: difference on the same rows and seeds, with its "
        "standard error over held-out rows (± text). ECE: expected calibration error, 15 bins.",
        f"\n![Held-out loss and calibration of each objective]({picture})\n",
        *_expectations(setting["expected"]),
        END,
    ]
    return "\n".join(text)


def _expectations(expected: dict[str, Any]) -> list[str]:
    lines = []
    if "within_1_percent" in expected:
        holds = "holds" if expected["within_1_percent"] else "does not hold"
        excess = expected["decoupled_over_full_kl"] - 1
        lines.append(f"Expected: decoupled top 32 within 1% of full KL. It {holds}: {excess:+.2%}.")
    if "not_below_ce" in expected:
        above = expected["not_below_ce"]
        found = f"Not so: {', '.join(above)}." if above else "So it is."
        lines.append(f"Expected: every distilled student below cross-entropy. {found}")
    return lines


def write_between(readme: Path, first: str, last: str, text: str) -> None:
    """Put `text`, which begins and ends with the marks, where they are; LmdistillError where they are not."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise LmdistillError(f"{readme} has no place for the table", fix=f"put in the lines {first} and {last}")
    readme.write_text(before + text + after, encoding="utf-8")


def write_page(result: dict[str, Any], readme: Path, picture: Path) -> None:
    """Put table and plot in place; LmdistillError where the page has no marks to put them between."""
    picture.write_text(plot(result), encoding="utf-8")
    try:
        link = picture.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:  # elsewhere on the disk
        link = picture.resolve().as_uri()
    write_between(readme, BEGIN, END, section(result, link))


def main() -> None:
    """Write the page again, or print the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; write nothing")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text())
    if args.json:
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows_of(result)]))
    else:
        write_page(result, README, RESULT.with_suffix(".svg"))


if __name__ == "__main__":
    main()
