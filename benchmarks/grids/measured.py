"""A model on its grids, measured as what ships: as a packed file in llama.cpp where there is one, else in transformers.

Weights on 8da4w are read back by torchao, whose operators a `.pte` computes with.

`python benchmarks/quantize.py` puts these figures beside those of files that llama.cpp quantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grids.parent import Figures, Parent
from grids.ways import Way
from lmdistill.checkpoints import load_model
from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.packed_gguf import verify_packed, write_packed_gguf
from lmdistill.evaluation.runtimes.checkpoint import CheckpointRuntime
from lmdistill.evaluation.runtimes.llama_cpp import GgufRuntime
from lmdistill.quantization.on_grid import kept_on_its_grids
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.size import sizes


def measured(parent: Parent, way: Way, model: Path) -> Figures:
    """KL and loss of a trained model, and whether its file has its very weights."""
    from safetensors.torch import load_file

    placement = Placement.load(model)
    assert placement is not None
    tensors = load_file(model / "model.safetensors")
    size = {"size": sizes(tensors, placement)}
    if way.preset in FORMATS:
        target = parent.file(way, "trained")
        write_packed_gguf(model, target, placement, way.preset, name=way.name, parent="0" * 64)
        figures = {"bit_equal": True, "tensors": verify_packed(target, model), "bytes": target.stat().st_size}
        figures |= parent.scored(GgufRuntime.open(target, parent.options, exact=True))
        target.unlink()
        return figures | size
    figures = {"bit_equal": not _off_grid(tensors, placement), "tensors": len(placement.on_grids())}
    loaded = load_model(model)
    kept_on_its_grids(loaded, model)  # where activations are rounded too, that is part of the grid
    return figures | parent.scored(CheckpointRuntime(loaded, "cpu")) | size


def _off_grid(tensors: dict[str, Any], placement: Placement) -> list[str]:
    """Tensors that are not what their packed bytes stand for."""
    import torch

    found = []
    for name, grid in placement.on_grids().items():
        unpacked = grid.unpack(grid.pack(grid.quantise(tensors[name], placement.scales[name])))
        read = _by_torchao(unpacked) if grid.name == "8da4w" else grid.dequantise(unpacked)
        if not torch.equal(read, tensors[name]):
            found.append(name)
    return found


def _by_torchao(quantised: Any) -> Any:
    """The float32 weights that torchao makes of codes and scales."""
    import torch
    from torchao.quantization.quant_primitives import dequantize_affine

    codes, scales = quantised.codes, quantised.scales["d"].float()
    group, zeros = codes.shape[1] // scales.shape[1], torch.zeros(scales.shape, dtype=torch.int8)
    return dequantize_affine(codes, (1, group), scales, zeros, torch.int8, -8, 7)
