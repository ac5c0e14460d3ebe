"""A promise that is not kept: the report is there and shows it, and the run ends as a failure, cached or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from chain import STAGES, Chain

GATES = "stages.evaluate.gates=[{of: distill, metric: nll, at_most: 0.5}, {of: ce, metric: nll, at_most: 99}]"
BROKEN = ("--set", GATES, "--set", "stages.evaluate.tokens=64", "--set", "stages.evaluate.metrics=[]")


def test_a_broken_gate_fails_the_run_and_not_the_report(upto: Callable[..., Chain], finished: Chain) -> None:
    chain = upto(*STAGES[:-1])
    message = chain.fail(*BROKEN)
    page = chain.run_dir / "report.html"
    assert message.startswith("error: 1 quality gate of the recipe failed\n")
    assert "distill nll ≤ 0.5  measured " in message and "ce nll" not in message
    assert f"read {page.relative_to(chain.folder)}" in message
    assert "✗ broken" in page.read_text() and "✓ kept" in page.read_text()
    gates = json.loads((chain.run_dir / "report.json").read_text())["gates"]
    assert [gate["passed"] for gate in gates] == [False, True]
    assert chain.artefact("evaluate").is_dir(), "what was measured is kept"

    page.unlink()
    done = chain.run(*BROKEN)
    assert done.returncode == 2 and done.stderr == message, "a red report stays red when all is cached"
    assert "[8/8] evaluate: cached" in done.stdout
    assert "✗ broken" in page.read_text()

    green = finished.artefact("evaluate")
    shutil.copytree(green, chain.run_dir / green.name)
    chain.succeed()
    assert "✗ broken" not in page.read_text(), "the report is that of the recipe as it is now"


def test_a_run_without_its_report_holds_no_promise(upto: Callable[..., Chain]) -> None:
    chain = upto("corpus", "evaluate")
    evaluation = chain.artefact("evaluate") / "out" / "evaluation.json"
    gate = {"gate": "distill nll ≤ 0.5", "measured": 9.0, "limit": 0.5, "passed": False}
    text = json.dumps(json.loads(evaluation.read_text()) | {"gates": [gate]})
    evaluation.write_text(text)
    chain.succeed("--until", "corpus", "--set", "stages.evaluate.tokens=256")
    assert not (chain.run_dir / "report.html").exists()
