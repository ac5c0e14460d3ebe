"""A checkpoint's tensors as the layers of a program: in float32, or as the codes and scales of a grid they lie on.

XNNPACK recognises a layer on the 8da4w grid by torchao's operators around it. They are written out here around the
codes and scales of the placement, so that no second quantisation can come in between.

Axes: S tokens, O outputs, I inputs, W groups of inputs that share a scale, V vocabulary, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lmdistill.deployment.executorch.nibbles import high_first
from lmdistill.deployment.executorch.places import GRID
from lmdistill.deployment.gguf_writer import Checkpoint
from lmdistill.errors import IntegrityError
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.wanted import EMBEDDINGS


@dataclass(frozen=True)
class OnGrid:
    """A matrix as codes and scales."""

    codes_OI: torch.Tensor  # int8, −8 to 7
    scales_OW: torch.Tensor  # bfloat16

    def rows(self, part: int, parts: int) -> OnGrid:
        """One of `parts` equal groups of rows."""
        return OnGrid(self.codes_OI.chunk(parts)[part], self.scales_OW.chunk(parts)[part])

    @property
    def points_OI(self) -> torch.Tensor:
        """The float32 weights that these are."""
        steps_OI = self.scales_OW.float().repeat_interleave(self.codes_OI.shape[1] // self.scales_OW.shape[1], 1)
        return self.codes_OI * steps_OI


class GroupLinear(nn.Module):  # type: ignore[misc]
    """A linear layer on the 8da4w grid: activations rounded to 8 bits a token, weights from codes and scales."""

    def __init__(self, weights: OnGrid, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.group = weights.codes_OI.shape[1] // weights.scales_OW.shape[1]
        self.bias = bias
        self.register_buffer("codes", weights.codes_OI.contiguous())
        self.register_buffer("scales", weights.scales_OW.float().contiguous())  # XNNPACK makes bfloat16 of them again
        self.register_buffer("zeros", torch.zeros(weights.scales_OW.shape, dtype=torch.int8))

    def forward(self, hidden_SI: torch.Tensor) -> torch.Tensor:
        """`[S, O]`."""
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )

        block, int8 = (1, hidden_SI.shape[1]), torch.int8
        scale, zero = choose_qparams_affine(
            hidden_SI, MappingType.ASYMMETRIC, block, int8, quant_min=-128, quant_max=127, zero_point_dtype=int8
        )
        rounded = quantize_affine(hidden_SI, block, scale, zero, int8, -128, 127)
        hidden_SI = dequantize_affine(rounded, block, scale, zero, int8, -128, 127)
        weight_OI = dequantize_affine(self.codes, (1, self.group), self.scales, self.zeros, int8, -8, 7)
        return functional.linear(hidden_SI, weight_OI, self.bias)


class GroupEmbedding(nn.Module):  # type: ignore[misc]
    """An embedding on the 8da4w grid, two codes a byte."""

    def __init__(self, weights: OnGrid) -> None:
        super().__init__()
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  (registers the operator)

        self.register_buffer("packed", high_first(weights.codes_OI))
        self.register_buffer("scales", weights.scales_OW.float())  # the operator's output has their dtype

    def forward(self, tokens_S: torch.Tensor) -> torch.Tensor:
        """`[S, E]`."""
        found: torch.Tensor = torch.ops.quantized_decomposed.embedding_4bit.default(
            self.packed, self.scales, None, -8, 7, tokens_S
        )
        return found


class CheckpointWeights:
    """The layers of a checkpoint, whose tensors are where `placement` has them.

    With scales in the placement the weights must lie on their grids exactly (IntegrityError); else they are put there.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        self.checkpoint, self.placement = checkpoint, placement
        self._on_grids: dict[str, OnGrid] = {}

    def tensor(self, tensor: str) -> torch.Tensor:
        """A tensor in float32; raises IntegrityError where it is not finite."""
        found: torch.Tensor = self.checkpoint.tensor(tensor)
        if not found.isfinite().all():
            raise IntegrityError(f"{tensor} in {self.checkpoint.folder} holds numbers that are not finite")
        return found

    def on_grid(self, tensor: str) -> OnGrid | None:
        """Codes and scales of a tensor; None where it ships in float32."""
        if self.placement.grids.get(tensor) != GRID:
            return None
        if tensor not in self._on_grids:
            weights, grid, scales = self.tensor(tensor), self.placement.grid(tensor), self.placement.scales.get(tensor)
            if scales is not None:
                grid.pack_exactly(weights, scales, tensor)
            quantised = grid.quantise(weights, scales)
            self._on_grids[tensor] = OnGrid(quantised.codes, quantised.scales["d"])
        return self._on_grids[tensor]

    def points(self, tensor: str) -> torch.Tensor:
        """A tensor in float32 as it ships: the trained weights, or the points that those without scales are put on."""
        quantised = self.on_grid(tensor)
        return self.tensor(tensor) if quantised is None or tensor in self.placement.scales else quantised.points_OI

    def vector(self, name: str) -> torch.Tensor:
        """The tensor `<name>.weight` in float32."""
        return self.tensor(f"{name}.weight")

    def linear(self, name: str, part: int = 0, parts: int = 1) -> nn.Module:
        """The layer of the matrix `<name>.weight`, or of some of its rows, with its bias where it has one."""
        bias = self._bias(name, part, parts)
        quantised = self.on_grid(f"{name}.weight")
        if quantised is not None:
            return GroupLinear(quantised.rows(part, parts), bias)
        weight_OI = self.vector(name).chunk(parts)[part].contiguous()
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight_OI, requires_grad=False)
        if bias is not None:
            layer.bias = bias
        return layer

    def _bias(self, name: str, part: int, parts: int) -> Any:
        if f"{name}.bias" not in self.checkpoint.shapes:
            return None
        return nn.Parameter(self.tensor(f"{name}.bias").chunk(parts)[part].contiguous(), requires_grad=False)

    def embedding(self) -> nn.Module:
        """The embeddings."""
        quantised = self.on_grid(EMBEDDINGS)
        if quantised is not None:
            return GroupEmbedding(quantised)
        return nn.Embedding.from_pretrained(self.tensor(EMBEDDINGS))
