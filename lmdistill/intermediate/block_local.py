"""Single blocks: each learns by itself what the teacher's blocks do that it stands for, as in growing a student."""

from __future__ import annotations

import torch

from lmdistill.intermediate.hidden_mse import HiddenMse
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.registry import Sides, intermediate


@intermediate("block_local", reads="block", options=("relative", "block_input"))
class BlockLocal(HiddenMse):
    """Squared error of a block's output as in hidden_mse, but the gradient ends where the block begins."""

    input_scale: torch.Tensor  # as `scale`, where the block begins

    def __init__(self, sides: Sides, keys: IntermediateKeys) -> None:
        super().__init__(sides, keys)
        self.register_buffer("input_scale", torch.ones(()))
