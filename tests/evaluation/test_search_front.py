"""The search on the page: every candidate in its role, and nothing where there was no search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdistill.evaluation.search_front import front_chart, search_of

STAGES = [{"name": "search", "fingerprint": "5" * 64}]


def tried(digest: str, decode_ms: float, kd: float, feasible: bool = True) -> dict[str, Any]:
    return {"digest": digest, "predicted": {"decode_ms": decode_ms}, "loss": {"kd": kd}, "feasible": feasible}


def write(run_dir: Path) -> Path:
    record = {
        "method": "supernet",
        "budgets": ["decode_tps >= 100"],
        "sub_spaces": [{"name": "all", "hypervolume": [0.1, 0.2]}],
        "candidates": [
            tried("a", 5, 2.0), tried("b", 6, 1.5), tried("c", 7, 1.2), tried("d", 8, 1.9), tried("e", 20, 1, False),
            tried("a", 5, 2.0),
        ],
        "front": ["a", "b", "c"],
        "finalists": [{"digest": "c"}, {"digest": "b"}],
        "winner": "c",
    }  # fmt: skip
    folder = run_dir / f"03-search-{'5' * 12}" / "out"
    folder.mkdir(parents=True)
    (folder / "search.json").write_text(json.dumps(record))
    return run_dir


def test_every_candidate_is_shown_once_in_its_role(tmp_path: Path) -> None:
    search = search_of(write(tmp_path), STAGES)
    assert search is not None and (search["tried"], search["feasible"]) == (5, 4)
    roles = [one["role"] for one in search["points"]]
    assert roles == ["front", "finalists", "chosen", "within budget", "over budget"]
    drawn, legend = front_chart(search)
    assert drawn.count("<circle") == 5 and legend == ["over budget", "within budget", "front", "finalists", "chosen"]
    assert drawn.count('class="point"') == 5 and ">chosen</text>" in drawn


def test_without_a_search_there_is_no_chart(tmp_path: Path) -> None:
    assert search_of(tmp_path, STAGES) is None
    assert front_chart(None) == ("", [])
