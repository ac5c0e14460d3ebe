"""Optimisers in 8 bits, and activations computed again: they learn, resume bit for bit, and are asked for by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill_stage import STAGE, _files, _train
from training_toys import save_word_tokenizer

from lmdistill.pipeline.stage import Artefact, PreflightContext
from lmdistill.training import optimizer, optimizers
from lmdistill.training.config import DistillConfig

EIGHT_BIT = [name for name, kind in optimizers.kinds().items() if kind.extra == "bitsandbytes"]


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """Wide enough (64×64 = 4,096) that its matrices' moments are really kept in 8 bits."""
    from training_toys import SHAPE
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.05)).save_pretrained(path / "out/model")
    save_word_tokenizer(path / "out/model")
    return Artefact("student", "student", "student", "d" * 64, path)


def _tensors(entry: Any) -> list[torch.Tensor]:
    """All tensors of a parameter's state, however deep."""
    if isinstance(entry, dict):
        return [tensor for inner in entry.values() for tensor in _tensors(inner)]
    return [entry] if isinstance(entry, torch.Tensor) else []


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_an_optimiser_in_8_bits_learns_and_resumes_bit_for_bit(
    name: str, signals: Artefact, wide_student: Artefact, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    keys = {"optimizer": name, "lr": 0.05 if "lion" in name else 0.2, "tokens": 32 * 8 * 8}
    record = _train(tmp_path / "whole", signals, wide_student, **keys)
    assert record["log"][-1]["loss"] < 0.97 * record["log"][0]["loss"]
    kept = tmp_path / "whole/work/checkpoints"
    newest = max(kept.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    kept_moments = [one for entry in state.values() for one in _tensors(entry) if one.numel() == 64 * 64]
    assert kept_moments and all(one.dtype == torch.uint8 for one in kept_moments)
    shutil.copytree(kept, tmp_path / "resumed/work/checkpoints")
    shutil.rmtree(tmp_path / "resumed/work/checkpoints" / newest.name)
    _train(tmp_path / "resumed", signals, wide_student, **keys)
    assert _files(tmp_path / "whole/out") == _files(tmp_path / "resumed/out")


def test_embeddings_keep_their_moments_in_float32() -> None:
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128, bias=False))
    built = optimizer.build(model, optimizer.step_sizes(model, 0.1, True), 0.0, (0.9, 0.95), "adamw_8bit")
    model(torch.arange(5)).sum().backward()
    built.step()
    kinds = [built.state[parameter]["state1"].dtype for parameter in model.parameters()]
    assert kinds == [torch.float32, torch.uint8]


def test_an_unknown_optimiser_is_named_before_work(tmp_path: Path) -> None:
    [problem] = STAGE.preflight(PreflightContext("distill", DistillConfig(optimizer="adamw8bit"), {}, None, tmp_path))
    assert "did you mean 'adamw_8bit'" in problem.what and "lion_8bit" in problem.fix


def test_bitsandbytes_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = DistillConfig(optimizer="lion_8bit")
    [problem] = STAGE.preflight(PreflightContext("distill", config, {}, None, tmp_path))
    assert "`optimizer: lion_8bit` needs the package bitsandbytes" in problem.what
    assert "lmdistill[bitsandbytes]" in problem.fix


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_computed_again_change_no_bit(
    precision: str, signals: Artefact, student: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.checkpoint

    _train(tmp_path / "kept", signals, student, precision=precision, tokens=1024)
    calls = []
    real = torch.utils.checkpoint.checkpoint
    for place in ("torch.utils.checkpoint.checkpoint", "transformers.modeling_utils.checkpoint"):
        monkeypatch.setattr(place, lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    _train(tmp_path / "again", signals, student, precision=precision, tokens=1024, gradient_checkpointing=True)
    assert calls, "nothing was computed again"
    assert _files(tmp_path / "kept/out") == _files(tmp_path / "again/out")
