"""The grids of llama.cpp: the bytes are those of its C code and of the gguf package, for random and real weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.conftest import GGML_GRIDS, KINDS, RealWeights, Reference, bits, drawn_weights, weights

from lmdistill.quantization.registry import get


@pytest.mark.parametrize("name", GGML_GRIDS)
@settings(max_examples=15, deadline=None)
@given(values=drawn_weights())
def test_pack_gives_the_bytes_of_llama_cpp(name: str, reference: Reference, values: torch.Tensor) -> None:
    grid = get(name)
    assert torch.equal(grid.pack(grid.quantise(values)), reference(name, values))


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q8_0"])
@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_any_block_packs_to_the_bytes_of_llama_cpp(name: str, reference: Reference, block: list[float]) -> None:
    grid, values = get(name), torch.tensor([block])
    assert torch.equal(grid.pack(grid.quantise(values)), reference(name, values))


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q8_0"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("zeros", "tiny")])  # it has no sign of zero
def test_pack_gives_the_bytes_of_the_gguf_package(name: str, kind: str) -> None:
    grid, values = get(name), weights(kind, 3)
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name.upper()])
    if kind == "many zeros":  # nor does it start empty blocks from +0
        expected = expected.reshape(-1, grid.block_bytes)[(values.reshape(-1, grid.block) != 0).any(1).numpy()]
    packed = grid.pack(grid.quantise(values)).view(-1, grid.block_bytes)
    if kind == "many zeros":
        packed = packed[(values.reshape(-1, grid.block) != 0).any(1)]
    assert np.array_equal(packed.numpy().ravel(), expected.ravel())


@pytest.mark.parametrize("name", GGML_GRIDS)
@settings(max_examples=8, deadline=None)
@given(values=drawn_weights())
def test_dequantised_weights_are_those_of_the_gguf_package(name: str, values: torch.Tensor) -> None:
    grid = get(name)
    packed = grid.pack(grid.quantise(values))
    expected = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert bits(grid.dequantise(grid.unpack(packed))) == expected.tobytes()


@pytest.mark.parametrize("name", GGML_GRIDS)
def test_a_real_models_matrices_pack_to_the_bytes_of_llama_cpp(
    name: str, reference: Reference, real_weights: RealWeights
) -> None:
    grid = get(name)
    for tensor, values in real_weights():
        rows = values[:96].reshape(-1, 768) if grid.block == 256 else values  # the widths 576 and 1,536 of the model
        assert torch.equal(grid.pack(grid.quantise(rows)), reference(name, rows)), tensor


def test_every_chunk_of_a_large_tensor_is_packed(reference: Reference) -> None:
    values = weights("normal", 5, (300, 768))  # several chunks, the last one not full
    for name in ("q4_0", "q6_k"):
        assert torch.equal(get(name).pack(get(name).quantise(values)), reference(name, values))
