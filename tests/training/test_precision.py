"""Products are made in bfloat16 only where the processor is made for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmdistill import precision
from lmdistill.pipeline.stage import ModelRef
from lmdistill.precision import products_in
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.transformers_engine import TransformersEngine


def cpu(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: has)


@pytest.mark.parametrize(("has", "made_in"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_without_the_instructions_makes_them_in_float32(
    has: bool, made_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(monkeypatch, has)
    assert products_in("bfloat16", "cpu") == made_in
    assert products_in("bfloat16", "cuda:1") == "bfloat16"
    assert products_in("float32", "cpu") == "float32"


def test_this_cpu_is_asked_and_answers() -> None:
    assert products_in("bfloat16", "cpu") in ("bfloat16", "float32")


def test_a_teachers_weights_stay_as_coarse_as_was_asked_for(
    toy_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(monkeypatch, False)
    folder, engine = toy_llama(num_hidden_layers=1), TransformersEngine()
    engine.open(ModelRef("toy", folder, "t"), EngineOptions(4, 512, precision="bfloat16", device="cpu"))
    weights = [weight.detach() for weight in engine._model.parameters()]
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
