"""Tensors put on grids as a reference would, without a model around them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lmdistill.quantization.placement import Placement


def place(
    tensors: Mapping[str, torch.Tensor], wanted: Placement | Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], Placement]:
    """Put a checkpoint's tensors where they are wanted, as the reference would: the points, and where they lie."""
    placement = wanted if isinstance(wanted, Placement) else Placement(dict(wanted))
    points: dict[str, torch.Tensor] = {}
    scales: dict[str, dict[str, torch.Tensor]] = {}
    on_grids = placement.on_grids()
    for tensor, weights in tensors.items():
        if tensor not in on_grids:
            points[tensor] = weights.float() if placement.grids[tensor] == "f32" else weights.half().float()
            continue
        grid = on_grids[tensor]
        grid.check_width(weights.shape[-1], tensor)
        quantised = grid.quantise(weights)
        points[tensor], scales[tensor] = grid.dequantise(quantised), quantised.scales
    return points, placement.with_scales(scales)
