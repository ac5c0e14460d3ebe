"""benchmarks/quantize.py in small: every figure is kept, a piece that is out of time goes on, and bits are equal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quantize
import torch
from grids import executorch, ways
from grids.measured import _off_grid
from placed import place

from lmdistill.corpus.config import CorpusConfig, Source
from lmdistill.evaluation.speed import SpeedPlan
from lmdistill.pipeline.stage import ModelRef, Runtime, StageContext
from lmdistill.stages import load_stage

TEXT = "the {0} cat number {0} sat on the {1} mat and said {2} to the {1} dog; it is late, said the dog.\n\n"
SMALL = ["--ways", "Q4_0", "learned_points_2bit", "--steps", "5", "10", "--learned-steps", "5", "--heldout", "96"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_llama: Callable[..., Path]) -> tuple[Path, Path]:
    """(a toy model, a corpus of its tokens)"""
    root = tmp_path_factory.mktemp("quantize")
    model = toy_llama(seed=1, num_hidden_layers=1, hidden_size=192, intermediate_size=192)
    (root / "text.txt").write_text("".join(TEXT.format(i, i * i % 7, i % 5) for i in range(60)))
    config = CorpusConfig(sources=[Source(source=str(root / "text.txt"))], sequence_length=32, valid_fraction=0.2)
    (root / "out").mkdir(), (root / "work").mkdir()
    teacher = ModelRef("teacher", model, "t" * 64)
    load_stage("corpus").run(
        StageContext("corpus", config, {}, teacher, root / "out", root / "work", runtime=Runtime("cpu", 1, 1))
    )
    return model, root / "out"


@pytest.fixture
def run(world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The script as it is called, on the toy."""
    model, corpus = world

    def parents(arguments: Any, deadline: quantize.Deadline) -> list[quantize.Parent]:
        return [quantize.Parent("student", model, {32: corpus}, corpus, arguments.work, arguments.heldout, deadline)]

    monkeypatch.setattr(quantize, "_parents", parents)
    monkeypatch.setitem(ways.CACHE, "k", 8)
    monkeypatch.setattr(ways, "WARMUP_STEPS", 1)
    for name, way in quantize.WAYS.items():
        quick = replace(way, training=way.training | {"precision": "float32"}, rows=4, row_tokens=32)
        monkeypatch.setitem(quantize.WAYS, name, quick)

    def go(*arguments: str) -> dict[str, Any]:
        places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "quantize.json")]
        monkeypatch.setattr(sys, "argv", ["quantize.py", "runs/none", "--json", *SMALL, *places, *arguments])
        quantize.main()
        out = tmp_path / "quantize.json"
        return json.loads(out.read_text()) if out.exists() else {}

    return go


def test_every_figure_is_there_and_a_piece_out_of_time_goes_on(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--minutes", "0") == {}
    assert json.loads(capsys.readouterr().out)["complete"] is False
    result = run()
    assert json.loads(capsys.readouterr().out)["complete"] is True
    shipped, points = result["Q4_0"], result["learned_points_2bit"]
    assert result["by_model"]["student"] == {"Q4_0": shipped, "learned_points_2bit": points}
    assert shipped["bit_equal"] is True and points["bit_equal"] is True
    assert set(shipped["kl_qad"]) == {"5", "10"} and set(points["kl_qad"]) == {"5"}
    assert {"parent", "ptq", "ptq_imatrix", "start", "qad_5", "qad_10"} == set(shipped["nll"])
    assert shipped["kl_start"] < shipped["kl_ptq"]
    best = min(shipped["kl_ptq"], shipped["kl_ptq_imatrix"])
    assert shipped["recovered"] == pytest.approx(1 - shipped["kl_qad"]["10"] / best, abs=1e-4)
    assert points["size"]["huffman_bits"] <= points["size"]["bits"]
    assert run()["by_model"] == result["by_model"]  # nothing is made twice: the seconds are those of the first time


def test_a_plan_says_what_is_missing(run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    run("--plan", "--ways", "Q4_0")
    lines = capsys.readouterr().out.splitlines()
    pieces = ["parent", "Q4_0/ptq", "Q4_0/ptq_imatrix", "Q4_0/start", "Q4_0/qad-5", "Q4_0/qad-10"]
    assert [line.split(" | ")[1] for line in lines[2:-1]] == pieces, "it is its own teacher: nothing to capture"
    run("--plan", "--ways", "learned_points_2bit")
    assert [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines()[2:4]] == ["parent", "capture-32"]
    assert "min on two quiet cores" in lines[-1]


def test_figures_of_another_model_or_way_are_refused(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--ways", "learned_points_2bit")
    other = replace(quantize.WAYS["learned_points_2bit"], rows=2)
    monkeypatch.setitem(quantize.WAYS, "learned_points_2bit", other)
    with pytest.raises(SystemExit, match="with other rows"):
        run("--ways", "learned_points_2bit")
    with pytest.raises(SystemExit, match="with other heldout"):
        run("--ways", "Q4_0", "--heldout", "64")


def test_what_was_measured_of_other_ways_stays_in_the_file_while_the_model_is_the_same(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_one", lambda *_: {"recovered": 0.5, "kl_qad": {}})
    before = run()
    before["parents"]["smollm"] = "another"
    before["by_model"] = {"student": {"executorch": {"fp32_max_abs": 1.0}}, "smollm": {"Q8_0": {"recovered": 0.1}}}
    (tmp_path / "quantize.json").write_text(json.dumps(before))
    result = run()
    assert result["executorch"] == {"fp32_max_abs": 1.0} and result["Q4_0"]["recovered"] == 0.5
    assert result["by_model"]["smollm"] == {"Q8_0": {"recovered": 0.1}}
    before["parents"]["student"] = "of an earlier run"
    (tmp_path / "quantize.json").write_text(json.dumps(before))
    result = run()
    assert "executorch" not in result and "executorch" not in result["by_model"]["student"]
    assert result["Q4_0"]["recovered"] == 0.5


@pytest.mark.parametrize("grid", ["8da4w", "q4_0"])
def test_weights_off_their_grid_are_named(grid: str) -> None:
    if grid == "8da4w":
        pytest.importorskip("torchao", reason="torchao reads 8da4w: pip install 'lmdistill[executorch]'")
    weights = {name: torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) for name in ("a", "b")}
    points, placement = place(weights, dict.fromkeys(weights, grid))
    assert _off_grid(points, placement) == []
    points["b"][1, 2] += 1e-6
    assert _off_grid(points, placement) == ["b"]


@pytest.mark.skipif("LMDISTILL_SLOW" not in os.environ, reason="two minutes of lowering: make test-slow")
def test_programs_are_measured_beside_llama_cpps_files(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed: pip install 'lmdistill[executorch]'")
    monkeypatch.setattr(executorch, "SPEED", SpeedPlan(prefill=16, decode=4, repeats=1, threads=1))
    monkeypatch.setattr(executorch, "CONTEXT", 512)
    found = run("--ways", "executorch")["executorch"]
    assert found["fp32_max_abs"] <= 1e-4 and found["bit_equal"] is True
    assert all(share >= 0.95 for share in found["delegated"].values())
    assert set(found["files"]) == {"f32", "q4_0", "pte_f32", "pte_8da4w_all"}
    assert {"kl", "nll"} <= set(found["files"]["pte_8da4w_all"]) & set(found["files"]["q4_0"])
    assert all(rate > 0 for rates in found["over_llama_cpp"].values() for rate in rates.values())
    capsys.readouterr()
    run("--ways", "executorch", "--plan")
    assert capsys.readouterr().out.count("student") == 0, "nothing is missing any more"
