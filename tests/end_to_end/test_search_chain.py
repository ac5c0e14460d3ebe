"""A search in the chain, run as users run it: timed here, a student chosen, its front on the page; and killed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chain import Chain
from test_chain_kill import Running

SEARCH = """\
  - stage: search
    space: {depth: [2, 3], intermediate_sizes: [64, 96, 128], kernels: [2, 3]}
    budgets: [decode >= 0.2x teacher]
    timing: {candidates: 12, prompts: [16], decode: 4, rounds: 1}
    objectives: [decode_ms, file_mb]
    heldout_rows: 2
    selection_rows: 1
    selection_width: 1
    training: {batch_rows: 2, checkpoint_steps: 2}
    supernet: {tokens: 512, importance_rows: 4, fit_rows: 4, fit_steps: 1, fit_batch_rows: 2}
    evolution: {population: 3, generations: 2}
    finalists: {count: 2, fit_steps: 1, tokens: 128}
  - stage: evaluate
    suite: quick
    metrics: [kl]
    tokens: 256
"""


# What shows that a search has something to lose in its longest parts: shared training, finalists' rounds.
# (Timing that is broken off is tests/search/test_device.py's, a line of scores tests/search/test_scores.py's.)
EVIDENCE = ("work/sub-all/training/checkpoint-*/complete", "work/finalists/*/after-1.json")
SEARCHED = ("--until", "search")


@pytest.fixture
def searching(upto: Callable[..., Chain]) -> Chain:
    """The chain's corpus and cache, then a search and the report."""
    chain = upto("corpus", "teach")
    file = chain.folder / chain.recipe
    file.write_text(file.read_text().split("  - stage: student\n")[0] + SEARCH)
    return chain


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a death on Linux only")
def test_a_search_chooses_by_timings_of_this_machine_and_killed_with_them_it_ends_the_same(searching: Chain) -> None:
    """One search timed here, and one that takes its timings and is killed twice: the timing is done once."""
    searching.succeed()
    _shows_its_front(searching)
    assert "cached" in searching.succeed()
    whole = shutil.move(searching.artefact("search"), searching.folder / "whole")
    shutil.copyfile(whole / "out" / "profile.json", searching.folder / "here.json")
    searching.change("  - stage: search\n", "  - stage: search\n    device: here.json\n")
    for pattern in EVIDENCE:
        running = Running(searching, SEARCHED)
        running.wait_for("search", pattern)
        running.kill_all()
        assert len(list(searching.run_dir.glob(".partial-search-*"))) == 1, "the kill came when the stage had ended"
    assert "search: resumed" in searching.succeed(*SEARCHED)
    assert found_in(searching.artefact("search")) == found_in(whole)


def _shows_its_front(searching: Chain) -> None:
    out = searching.artefact("search") / "out"
    found = json.loads((out / "search.json").read_text())
    profile = json.loads((out / "profile.json").read_text())
    assert len(profile["measured"]) >= 12 and found["teacher"]["decode_tps"] > 0
    assert all(one["measured"]["decode_tps"] > 0 for one in found["finalists"])
    (winner,) = {json.dumps(one) for one in found["candidates"] if one["digest"] == found["winner"]}
    assert json.loads(winner)["feasible"]
    report = json.loads((searching.run_dir / "report.json").read_text())
    assert {row["name"] for row in report["ladder"]} == {"teacher", "search"}
    assert report["search"]["tried"] == len({one["digest"] for one in found["candidates"]})
    page = (searching.run_dir / "report.html").read_text()
    assert 'id="front"' in page and ">chosen</text>" in page and "decode &gt;= 0.2x teacher" in page


def found_in(artefact: Path) -> dict[str, Any]:
    """A search's files."""
    out = artefact / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
