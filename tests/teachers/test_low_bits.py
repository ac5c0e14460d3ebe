"""Teachers in 4 and 8 bits: less memory, a price that is measured, and a clear word where they cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teach_contexts import before, running
from teachers_toys import VOCAB, save_corpus, save_tokenizer, save_toy

from lmdistill.checkpoints import load_model
from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import Artefact, ModelRef
from lmdistill.stages.teach import TeachStage
from lmdistill.teachers import low_bits

pytest.importorskip("bitsandbytes")
STAGE = TeachStage()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A teacher whose layers are as wide as bitsandbytes' blocks."""
    return save_toy(tmp_path_factory.mktemp("wide"), rows=VOCAB, hidden_size=64, intermediate_size=128)


@pytest.fixture
def corpus(tmp_path: Path) -> Artefact:
    save_tokenizer(tmp_path / "corpus" / "out" / "tokenizer")
    return save_corpus(tmp_path / "corpus", np.random.default_rng(1).integers(0, VOCAB, (4, 32)))


@pytest.mark.parametrize(("load_in", "limit"), [("nf4", 0.65), ("int8", 1.1)])
def test_linear_layers_take_so_many_bytes_a_weight_and_the_head_stays(
    load_in: str, limit: float, wide: ModelRef
) -> None:
    model = load_model(wide.path, load_in=load_in)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.numel() * layer.weight.element_size() < limit * 64 * 128
    assert model.lm_head.weight.dtype == torch.float32


# far apart as losses go: a toy's random weights, wide and untrained, round worse than those of a trained model
@pytest.mark.parametrize(("load_in", "apart"), [("nf4", 1.0), ("int8", 0.2)])
def test_what_the_teacher_loses_is_in_the_stages_figures(
    load_in: str, apart: float, wide: ModelRef, corpus: Artefact, tmp_path: Path
) -> None:
    context = running(wide, corpus, tmp_path / "out", load_in=load_in, precision="float32")
    context.out.mkdir()
    metrics = STAGE.run(context)
    figures = metrics["parity"]
    assert figures["nll_cost"] == pytest.approx(figures["nll"] - figures["nll_whole"])
    assert 0 < figures["mean_delta_logprob"] < apart
    manifest = json.loads((context.out / "signals.json").read_text())
    assert manifest["teacher"]["precision"] == f"float32, {load_in}"
    assert "bitsandbytes" in STAGE.tools_used(context.config)


def test_without_rows_to_measure_on_the_whole_teacher_is_never_loaded(
    wide: ModelRef, corpus: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bits, "open_reference", lambda *_: pytest.fail("loaded whole"))
    context = running(wide, corpus, tmp_path / "out", load_in="nf4", parity_rows=0)
    context.out.mkdir()
    assert "parity" not in STAGE.run(context)


def test_four_bits_lose_more_than_eight(wide: ModelRef) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (2, 64)))
    with torch.inference_mode():
        whole, *smaller = (load_model(wide.path, load_in=bits)(ids).logits for bits in (None, "nf4", "int8"))
    four, eight = ((one - whole).abs().mean() for one in smaller)
    assert 0 < eight < four / 2


def _problems(wide: ModelRef, corpus: Artefact, tmp_path: Path, **config: Any) -> list[str]:
    return [str(one) for one in STAGE.preflight(before(wide, corpus, tmp_path, k=8, **config))]


def test_a_machine_that_cannot_is_told_before_anything_runs(
    wide: ModelRef, corpus: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _problems(wide, corpus, tmp_path, load_in="nf4") == []

    def refuse(*_: Any) -> None:
        raise RuntimeError("no kernel for this processor\nand more")

    monkeypatch.setattr(low_bits, "_try", refuse)
    [problem] = _problems(wide, corpus, tmp_path, load_in="int8")
    assert "cannot run `load_in: int8` on cpu" in problem and "no kernel for this processor" in problem


def test_other_engines_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match="needs `engine: transformers`"):
        low_bits.check_low_bits("nf4", "vllm", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError, match="needs the package bitsandbytes"):
        low_bits.check_low_bits("nf4", "transformers", "cpu")
