"""The search's benchmark: what its result holds while pieces are missing and when all are there, and what starts it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import search as benchmark
from searching.bench import KINDS, artefact, bind
from searching.pieces import MAKERS, compared

PIECES: dict[str, Any] = {
    "search": {"front": 3},
    "random": {"ratio": 1.2},
    "short": {"spearman": 0.8},
    "equal": {"searched": {"nll": 4.0}, "hand_made": {"nll": 4.1}, "gap": {"nll": -0.1, "nll_se": 0.01}},
    "ranked": {"ratio": 1.1},
    "fresh": {"searched": {"nll": 4.0}, "hand_made": {"nll": 4.1}, "gap": {"nll": -0.1, "nll_se": 0.01}},
    "starts": {"fitted": {"nll": 4.0}, "shared": {"nll": 4.1}, "gap": {"nll": -0.1, "nll_se": 0.01}},
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


def test_the_ends_of_random_searchs_front_count() -> None:
    """Its fastest and its best candidate lie on the edges of the box up to its own worst."""
    drawn = [[1.0, 6.0], [1.2, 5.0]]
    found = compared([[0.8, 6.0], [1.0, 5.0]], drawn)
    assert found["reference"] == pytest.approx([1.32, 6.6])
    ours, theirs = 0.52 * 0.6 + 0.32 * 1.0, 0.32 * 0.6 + 0.12 * 1.0
    assert found["ratio"] == pytest.approx(ours / theirs, abs=1e-4)
    assert compared(drawn, drawn)["ratio"] == 1
    assert compared(drawn, [*drawn, [9.0, 9.0]])["ratio"] == 1 == compared([[1.0, 6.0]], [[1.0, 6.0]])["ratio"]


def test_random_search_far_from_the_joint_front_has_no_ratio_there() -> None:
    found = compared([[1.0, 6.0], [2.0, 5.0]], [[4.0, 6.5]])
    assert found["ratio_near_the_front"] is None and found["ratio"] > 1


def _finished(run: Path, stage: str, digest: str, number: int = 1) -> None:
    folder = run / f"{number:02}-{stage}-{digest}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": digest}))


def test_a_store_is_of_one_run_and_of_what_was_asked(tmp_path: Path) -> None:
    for stage in KINDS:
        _finished(tmp_path / "run", stage, "bbb")
    asked = argparse.Namespace(run=tmp_path / "run", store=tmp_path, random=8, short=8, short_tokens=64, heldout=64)
    bind(asked)
    bind(asked)
    asked.short_tokens = 32
    with pytest.raises(SystemExit, match=r"holds pieces of another short_tokens: name another --store"):
        bind(asked)
    asked.short_tokens = 64
    _finished(tmp_path / "run", "search", "aaa")  # newer, and not the last by its name
    os.utime(tmp_path / "run" / "01-search-aaa" / "manifest.json", (2e9, 2e9))
    with pytest.raises(SystemExit, match="another search"):
        bind(asked)


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
