"""The search's benchmark: what its result holds while pieces are missing and when all are there, and what starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import search as benchmark
from searching.bench import artefact
from searching.pieces import MAKERS

PIECES: dict[str, Any] = {
    "search": {"front": 3},
    "random": {"ratio": 1.2},
    "short": {"spearman": 0.8},
    "equal": {"searched": {"nll": 4.0}, "hand_made": {"nll": 4.1}, "gap": {"nll": -0.1, "nll_se": 0.01}},
    "device": {"searched": {"decode_tps": 240}, "hand_made": {"decode_tps": 230}},
}


def test_every_piece_has_its_maker() -> None:
    assert set(benchmark.PIECES) == set(MAKERS) == set(PIECES)


def test_figures_are_null_until_their_piece_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LATENCY", tmp_path / "search_latency.json")
    none = benchmark.figures(tmp_path)
    assert none["latency"] == dict.fromkeys(("held_out", "spearman", "median_rel_error"))
    assert [none[name] for name in ("hypervolume_ratio", "rank_correlation", "searched", "hand_made")] == [None] * 4
    (tmp_path / "search_latency.json").write_text(json.dumps({"held_out": 32, "spearman": 0.99, "model": {}}))
    for piece, result in PIECES.items():
        (tmp_path / f"{piece}.json").write_text(json.dumps(result))
    found = benchmark.figures(tmp_path)
    assert found["latency"] == {"held_out": 32, "spearman": 0.99, "median_rel_error": None}
    assert (found["hypervolume_ratio"], found["rank_correlation"]) == (1.2, 0.8)
    assert found["searched"] == {"nll": 4.0, "decode_tps": 240}
    assert found["hand_made"] == {"nll": 4.1, "decode_tps": 230}
    assert found["measured"] == PIECES


def test_a_run_that_is_not_finished_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no finished 'corpus': run recipes/lfm_search.yaml"):
        artefact(tmp_path, "corpus", "corpus")


def test_without_time_it_writes_what_there_is(tmp_path: Path) -> None:
    command = [sys.executable, benchmark.__file__, str(tmp_path), "--json", "--minutes", "0"]
    command += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "search.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "search.json").read_text()) and printed["searched"] is None
    assert printed["measured"]["command"].startswith("python benchmarks/search.py ")
