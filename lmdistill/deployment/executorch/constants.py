"""Proof that a `.pte` holds the trained weights: its constants are read back, dequantised and compared, every tensor.

ExecuTorch files constants by their content, not by name. So each tensor's constants are looked up by the SHA-256 of the
bytes they must have, in all places where the program needs them, and what lies there is turned back into weights.

Axes: O outputs, I inputs, W groups of inputs that share a scale, E hidden size, L taps of a convolution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lmdistill.deployment.executorch.layouts import Layout, architecture_for_pte, layout_of
from lmdistill.deployment.executorch.nibbles import from_high_first, from_low_first, high_first, low_first
from lmdistill.deployment.executorch.weights import CheckpointWeights, OnGrid
from lmdistill.deployment.gguf_writer import open_checkpoint, read_config
from lmdistill.errors import IntegrityError
from lmdistill.quantization.packing import raw
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.wanted import EMBEDDINGS


class Constants:
    """The constants in a `.pte`, by the SHA-256 of their bytes."""

    def __init__(self, path: Path) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        file = deserialize_pte_binary(path.read_bytes())
        delegates = file.named_data.buffers if file.named_data else []
        buffers = [*map(bytes, delegates), *(bytes(buffer.storage) for buffer in file.program.constant_buffer)]
        self.path = path
        self._by_digest = {hashlib.sha256(buffer).hexdigest(): buffer for buffer in buffers}

    def like(self, expected: torch.Tensor) -> torch.Tensor | None:
        """The file's constant with the bytes of `expected`; None where it has none."""
        stored = raw(expected.reshape(1, -1))[0].numpy().tobytes()
        found = self._by_digest.get(hashlib.sha256(stored).hexdigest())
        if found is None:
            return None
        return torch.frombuffer(bytearray(found), dtype=expected.dtype).view(expected.shape)


def verify_program(path: Path, folder: Path, placement: Placement) -> int:
    """Check that every tensor of the model in `folder` lies in the file as `placement` has it; how many there are.

    Raises IntegrityError with the tensors that are not there, or that are other weights once dequantised.
    """
    config = read_config(folder)
    layout, names, constants = layout_of(config), architecture_for_pte(config).tensors(), Constants(path)
    problems = []
    with open_checkpoint(folder) as checkpoint:
        weights = CheckpointWeights(checkpoint, placement)
        for tensor in names:
            trained = weights.points(tensor)
            for found in _weights_in_file(constants, weights, layout, tensor):
                if found is None:
                    problems.append(f"{tensor} is not in it")
                elif wrong := int((found != trained).sum()):
                    problems.append(f"{wrong} of the {trained.numel()} weights of {tensor} differ")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise IntegrityError(f"{path.name} is not the trained model", why="; ".join(problems[:5]) + more)
    return len(names)


def _weights_in_file(
    constants: Constants, weights: CheckpointWeights, layout: Layout, tensor: str
) -> Iterator[torch.Tensor | None]:
    """The tensor as the file has it, once for each place where the program needs it; None where it is missing."""
    quantised = weights.on_grid(tensor)
    if tensor == EMBEDDINGS:
        yield constants.like(weights.tensor(tensor)) if quantised is None else _embedding(constants, quantised)
    if tensor != EMBEDDINGS or layout.tied:
        parts = _parts(tensor)
        if quantised is not None:
            yield _joined([_matrix(constants, quantised.rows(part, parts)) for part in range(parts)])
        elif tensor.endswith("conv.conv.weight"):
            taps_EL = weights.tensor(tensor).squeeze(1)
            found = [constants.like(tap_E.contiguous()) for tap_E in taps_EL.T]
            yield None if any(one is None for one in found) else torch.stack(found, 1).unsqueeze(1)
        else:
            yield _joined([constants.like(rows.contiguous()) for rows in weights.tensor(tensor).chunk(parts)])


def _parts(tensor: str) -> int:
    """Into how many layers a matrix is cut."""
    return 3 if tensor.endswith("conv.in_proj.weight") else 1


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Rows in order; None where some are missing."""
    whole = [part for part in parts if part is not None]
    return torch.cat(whole) if len(whole) == len(parts) else None


def _matrix(constants: Constants, expected: OnGrid) -> torch.Tensor | None:
    """A linear layer's weights from XNNPACK's codes and bfloat16 scales."""
    packed, scales_OW = constants.like(low_first(expected.codes_OI)), constants.like(expected.scales_OW)
    return None if packed is None or scales_OW is None else OnGrid(from_low_first(packed), scales_OW).points_OI


def _embedding(constants: Constants, expected: OnGrid) -> torch.Tensor | None:
    """An embedding's weights from its operator's codes and float32 scales."""
    packed, scales_OW = constants.like(high_first(expected.codes_OI)), constants.like(expected.scales_OW.float())
    return None if packed is None or scales_OW is None else OnGrid(from_high_first(packed), scales_OW).points_OI
