"""kill -9 of the real pipeline at random moments of a capture; then the same command gives the same bytes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from captured_toy import ROWS, SHARD_ROWS
from robust import kills

KILLS = 3


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a death on Linux only")
def test_killed_captures_end_with_the_bytes_of_an_undisturbed_one(undisturbed, tmp_path):
    """Every kill falls between the first byte on disk and the end; `benchmarks/robustness.py` does fifty."""
    compact = replace(undisturbed.toy, settings=("--set", "stages.teach.variant=compact"))
    found = kills.kill_many(compact, undisturbed.base, tmp_path, KILLS, seed=3)
    assert found["kills"] == KILLS
    assert found["different"] == 0
    assert found["files"] == 2 * (ROWS + ROWS // 4) // SHARD_ROWS + 1
