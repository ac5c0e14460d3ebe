"""benchmarks/quality.py in small: every figure of the page comes from kept results, and nothing is trained twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import quality
import quality_page

from lmdistill.corpus.config import CorpusConfig, Source
from lmdistill.evaluation.heldout import read_heldout
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageConfig, StageContext
from lmdistill.stages import load_stage

WAYS = ["ce", "full_kl", "decoupled", "sampled_12"]
TEXT = "the {0} cat number {0} sat on the {1} mat and said {2} to the {1} dog; it is late, said the dog.\n\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_llama: Callable[..., Path]) -> quality.World:
    """Real stages on a toy teacher of real tokens."""
    root = tmp_path_factory.mktemp("quality")
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    teacher = ModelRef("teacher", toy_llama(seed=1, **shape), "t" * 64)
    made: dict[str, Artefact] = {}

    def make(name: str, stage: str, config: StageConfig) -> None:
        kind = load_stage(stage)
        inputs = {role.role: [made["corpus"]] for role in kind.inputs if "corpus" in made}
        out, work = root / name / "out", root / name / "work"
        out.mkdir(parents=True), work.mkdir()
        kind.run(StageContext(stage, config, inputs, teacher, out, work, runtime=Runtime("cpu", 1, 1)))
        made[name] = Artefact(name, stage, kind.output, name.ljust(64, "0"), root / name)
        manifest = {"metrics": {"teacher_nll": 1.0, "head_mass": 0.5, "parameters": 10, "layer_types": ["conv"]}}
        (root / name / "manifest.json").write_text(json.dumps(manifest))

    text = root / "text.txt"
    text.write_text("".join(TEXT.format(i, i * i % 7, i % 5) for i in range(60)))
    source = Source(source=str(text))
    make("corpus", "corpus", CorpusConfig(sources=[source], sequence_length=32, valid_fraction=0.2))
    teach = load_stage("teach").Config
    make("teach", "teach", teach(k=8))
    make("sampled_12", "teach", teach(variant="sampled", draws=12))
    make("student", "student", load_stage("student").Config(init="random", layers=1, attention_layers=1))
    return quality.World(made, teacher, read_heldout(made["corpus"].out, "valid", 256), root / "ways")


@pytest.fixture
def run(world: quality.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The script as it is called, its world being there already."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{quality_page.BEGIN}\nstale\n{quality_page.END}\nafter\n")
    monkeypatch.setattr(quality, "prepare", lambda *_: world)

    def run(*more: str) -> dict[str, Any]:
        small = f"--tokens 128 --seeds 2 --out {tmp_path / 'quality.json'} --readme {readme}".split()
        monkeypatch.setattr(sys, "argv", ["quality.py", *small, "--ways", *WAYS, *more])
        quality.main()
        figures: dict[str, Any] = json.loads((tmp_path / "quality.json").read_text())
        return figures

    return run


def test_every_way_is_measured_kept_and_shown(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = run()
    assert [*figures] == [*WAYS, "measured"]
    assert all(len(figures[way][measure]) == 2 for way in WAYS for measure in ("nll", "ece"))
    assert all(0 <= value <= 1 for way in WAYS for value in figures[way]["ece"])
    measured = figures["measured"]
    assert measured["tokens"] == 128
    assert measured["spread"]["ce"]["over_ce"] == [0.0, 0.0]
    assert {"hardware", "date", "command", "student", "start_nll", "expected"} <= measured.keys()
    assert 1 < measured["distinct_ids"]["sampled_12"] <= 12

    page = (tmp_path / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "stale" not in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(WAYS)
    assert all(quality_page.LABELS[way] in page for way in WAYS)
    circles = ElementTree.parse(tmp_path / "quality.svg").iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 2 * len(WAYS)

    monkeypatch.setattr(quality, "run_way", lambda *_: pytest.fail("a kept result was made again"))
    again = run()
    assert {way: again[way] for way in WAYS} == {way: figures[way] for way in WAYS}


def test_other_settings_are_other_results(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    trained = quality.run_way
    monkeypatch.setattr(quality, "run_way", lambda *given: made.append(given[0]) or trained(*given))
    other = ("--lr", "1e-3", "--seeds", "1", "--ways", "ce", "decoupled")
    before = run(*other)
    assert made == ["ce", "decoupled"]
    assert run(*other)["ce"] == before["ce"]
    assert made == ["ce", "decoupled"]
    run(*other, "--kd-weight", "0.25")
    assert made == ["ce", "decoupled", "decoupled"], "cross-entropy knows no weight"


def test_without_time_nothing_is_measured(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="nothing measured in 0 minutes"):
        run("--lr", "7e-4", "--minutes", "0")


def test_a_seed_missing_on_one_side_is_left_out_of_a_gap() -> None:
    def result(sums: list[float]) -> dict[str, Any]:
        return {"rows": {"sums": {"nll": sums}, "predictions": [10, 10]}}

    ours = {0: result([11.0, 12.0]), 1: result([50.0, 50.0])}
    assert quality.gap(ours, {0: result([10.0, 10.0])}) == [0.15, 0.05]
    assert quality.gap(ours, {2: result([10.0, 10.0])}) is None


def test_the_shipped_figures_are_those_of_the_page() -> None:
    if not quality_page.RESULT.exists():
        assert "Not measured yet" in quality_page.README.read_text()
        return
    figures = json.loads(quality_page.RESULT.read_text())
    page = quality_page.README.read_text(encoding="utf-8")
    for row in quality_page.rows_of(figures):
        assert "| " + " | ".join(row) + " |" in page
