"""A search in the chain, run as users run it: shapes timed here, a student chosen, its front on the page."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from chain import Chain

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


@pytest.fixture
def searching(upto: Callable[..., Chain]) -> Chain:
    """The chain's corpus and cache, then a search and the report."""
    chain = upto("corpus", "teach")
    file = chain.folder / chain.recipe
    file.write_text(file.read_text().split("  - stage: student\n")[0] + SEARCH)
    return chain


def test_a_search_makes_a_student_from_timings_of_this_machine_and_shows_its_front(searching: Chain) -> None:
    searching.succeed()
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
    assert "cached" in searching.succeed()
