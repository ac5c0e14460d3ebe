"""8da4w: codes, scales, weights and a linear layer's output are torchao's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from quantization.conftest import RealWeights, bits, drawn_weights, weights

from lmdistill.quantization.activations import fake_quantise_activations
from lmdistill.quantization.registry import get


def _torchao_layer(values: torch.Tensor, scale: str) -> torch.nn.Linear:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    layer = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(values)
    dtype = torch.bfloat16 if scale == "bf16" else None
    granularity = PerGroup(32)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=granularity, weight_scale_dtype=dtype
    )
    quantize_(layer, config)
    return layer


@pytest.mark.parametrize("scale", ["bf16", "f32"])
@settings(max_examples=15, deadline=None)
@given(values=drawn_weights())
def test_codes_and_scales_are_those_of_torchao(scale: str, values: torch.Tensor) -> None:
    pytest.importorskip("torchao")
    grid, theirs = get("8da4w", scale=scale), _torchao_layer(values, scale).weight
    ours = grid.quantise(values)
    assert torch.equal(ours.codes, theirs.qdata)
    assert torch.equal(ours.scales["d"], theirs.scale)
    assert bits(grid.fake_quantise(values)) == bits(theirs.dequantize())


@pytest.mark.parametrize("scale", ["bf16", "f32"])
def test_a_real_models_matrices_are_torchaos(scale: str, real_weights: RealWeights) -> None:
    pytest.importorskip("torchao")
    grid = get("8da4w", scale=scale)
    for tensor, values in real_weights():
        theirs, ours = _torchao_layer(values, scale).weight, grid.unpack(grid.pack(grid.quantise(values)))
        assert torch.equal(ours.codes, theirs.qdata) and torch.equal(ours.scales["d"], theirs.scale), tensor


@pytest.mark.parametrize("scale", ["bf16", "f32"])
def test_a_linear_layer_computes_what_torchaos_does(scale: str) -> None:
    pytest.importorskip("torchao")
    values, hidden = weights("normal", 20), weights("wide", 21)[:7]
    assert get("8da4w").dynamic_activations and not get("q4_0").dynamic_activations
    expected = _torchao_layer(values, scale)(hidden)
    found = torch.nn.functional.linear(
        fake_quantise_activations(hidden), get("8da4w", scale=scale).fake_quantise(values)
    )
    assert torch.equal(found, expected)


def test_activations_pass_their_gradient_and_keep_zero() -> None:
    hidden = torch.cat((weights("above zero", 22), weights("zeros", 23))).requires_grad_()
    found = fake_quantise_activations(hidden)
    found.sum().backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.ones_like(hidden))
    assert (found[24:] == 0).all()
    span = hidden.detach().amax(-1, keepdim=True).clamp(min=0) - hidden.detach().amin(-1, keepdim=True).clamp(max=0)
    assert ((found - hidden).abs() <= span / 255 * 0.5001).all()


def test_the_shipped_scales_are_bfloat16() -> None:
    """XNNPACK has no other group scales; the grid that training sees must be that one unless told otherwise."""
    assert get("8da4w").scale_dtypes()["d"] == torch.bfloat16
    assert get("8da4w").bits_per_weight == 4.5
    assert get("8da4w", scale="f32").bits_per_weight == 5.0
