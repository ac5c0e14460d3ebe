"""benchmarks/quantize.py in small: every figure is kept, a piece that is out of time goes on, and bits are equal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quantize
from grids import ways

from lmdistill.corpus.config import CorpusConfig, Source
from lmdistill.pipeline.stage import ModelRef, Runtime, StageContext
from lmdistill.stages import load_stage

TEXT = "the {0} cat number {0} sat on the {1} mat and said {2} to the {1} dog; it is late, said the dog.\n\n"
SMALL = ["--ways", "Q4_0", "learned_points_2bit", "--steps", "1", "2", "--learned-steps", "2", "--heldout", "96"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_llama: Callable[..., Path]) -> tuple[Path, Path]:
    """(a toy model, a corpus of its tokens)"""
    root = tmp_path_factory.mktemp("quantize")
    model = toy_llama(seed=1, num_hidden_layers=1, hidden_size=256, intermediate_size=256)
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
        return [quantize.Parent("student", model, corpus, arguments.work, arguments.heldout, deadline)]

    monkeypatch.setattr(quantize, "_parents", parents)
    quick = {"training": ways.TRAINING | {"precision": "float32", "log_steps": 1}, "step_tokens": 128}
    for name, way in quantize.WAYS.items():
        monkeypatch.setitem(quantize.WAYS, name, replace(way, **quick))

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
    assert set(shipped["kl_qad"]) == {"1", "2"} and set(points["kl_qad"]) == {"2"}
    assert {"ptq", "ptq_imatrix", "start", "qad_1", "qad_2"} == set(shipped["nll"])
    assert shipped["kl_start"] < shipped["kl_ptq"]
    best = min(shipped["kl_ptq"], shipped["kl_ptq_imatrix"])
    assert shipped["recovered"] == pytest.approx(1 - shipped["kl_qad"]["2"] / best, abs=1e-4)
    assert points["size"]["huffman_bits"] <= points["size"]["bits"]
    assert run() == result | {"date": run()["date"], "hardware": run()["hardware"]}  # nothing is made twice


def test_what_another_script_measured_stays_in_the_file(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quantize.json").write_text(json.dumps({"executorch": {"fp32_max_abs": 1.0}}))
    monkeypatch.setattr(quantize, "_one", lambda *_: {"recovered": 0.5, "kl_qad": {}})
    assert run()["executorch"] == {"fp32_max_abs": 1.0}
