"""ExecuTorch's 8da4w: 4-bit weights in groups with one scale each, and activations rounded to 8 bits as they come.

XNNPACK keeps group scales in bfloat16, whatever the checkpoint has, so that is the grid that ships; float32 scales
are torchao's default and lose their bits in the `.pte`. The bytes are ours (scale, then nibbles of code + 8):
ExecuTorch lays out codes and scales itself.

Axes: N blocks, B weights in a block, Y bytes in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lmdistill.errors import RecipeError
from lmdistill.quantization.arithmetic import divide
from lmdistill.quantization.grid import Scales
from lmdistill.quantization.one_step import OneStepGrid
from lmdistill.quantization.packing import from_nibbles, nibbles, raw, unraw
from lmdistill.quantization.registry import grid

_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@grid("8da4w")
@dataclass(frozen=True)
class Int4Dynamic(OneStepGrid):
    """Points code · d, codes from −8 to 7. Error at most d / 2, in bfloat16 up to 0.53 d, where nothing is cut off."""

    group: int = 32
    scale: Literal["bf16", "f32"] = "bf16"
    code_dtype = torch.int8
    least, most = -8, 7
    code_bits = 4
    dynamic_activations: ClassVar[bool] = True
    finds_again: ClassVar[bool] = False  # of 8 steps it would make 7.5

    def __post_init__(self) -> None:
        """Raise RecipeError for a group that bytes or torchao cannot hold."""
        if self.group < 2 or self.group % 2 or self.scale not in _DTYPES:
            raise RecipeError(f"grid '{self.name}' has groups of an even number of weights, and scale bf16 or f32")

    @property
    def block(self) -> int:
        """Weights in a group."""
        return self.group

    @property
    def block_bytes(self) -> int:
        """Scale and half a byte a weight."""
        return int(self._dtype.itemsize) + self.group // 2

    @property
    def _dtype(self) -> torch.dtype:
        return _DTYPES[self.scale]

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """The step `d`."""
        return {"d": self._dtype}

    def stored(self, scales: Scales) -> dict[str, torch.Tensor]:
        """XNNPACK takes positive steps alone: one that was learned beyond zero stays at the least there is."""
        return {name: one.clamp(min=torch.finfo(one.dtype).tiny) for name, one in super().stored(scales).items()}

    def _search(self, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """torchao's symmetric mapping: the largest magnitude is 7.5 steps, so that a positive one is cut to 7.

        The step's inverse is rounded to its dtype, as torchao does.
        """
        largest_N1 = torch.maximum(blocks_NB.amax(1, keepdim=True), -blocks_NB.amin(1, keepdim=True))
        d_N1 = divide(largest_N1, 7.5).clamp_(min=torch.finfo(torch.float32).tiny).to(self._dtype)
        codes_NB = (blocks_NB * d_N1.reciprocal().float()).round_().clamp_(-8, 7)
        return codes_NB, {"d": d_N1.squeeze(1)}

    def _to_bytes(self, codes_NB: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Scale, then nibbles."""
        return torch.cat((raw(scales["d"]), nibbles((codes_NB + 8).to(torch.uint8))), dim=1)

    def _from_bytes(self, bytes_NY: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size = self._dtype.itemsize
        codes_NB = from_nibbles(bytes_NY[:, size:]).to(torch.int8) - 8
        return codes_NB, {"d": unraw(bytes_NY[:, :size], self._dtype)}
