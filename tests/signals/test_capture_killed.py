"""kill -9 of the real pipeline at random moments of a capture; then the same command gives the same bytes."""

from __future__ import annotations

import sys

import pytest
from robust import kills, toy_run

KILLS, ROWS, SHARD_ROWS = 3, 512, 16


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a death on Linux only")
def test_killed_captures_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    """Every kill falls between the first byte on disk and the end; `benchmarks/robustness.py` does fifty."""
    toy = toy_run.make(tmp_path / "toy", "compact", ROWS, SHARD_ROWS)
    toy.succeed(tmp_path / "base", "--until", "corpus")
    found = kills.kill_many(toy, tmp_path / "base", tmp_path, KILLS, seed=3)
    assert found["kills"] == KILLS
    assert found["different"] == 0
    assert found["files"] == 2 * (ROWS + ROWS // 4) // SHARD_ROWS + 1
