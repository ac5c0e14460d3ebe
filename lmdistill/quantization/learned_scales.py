"""Block scales that are learned: gradients through the scale and through the rounding, after LSQ (arXiv 1902.08153).

With t the weight in steps of its scale, c = clamp(round(t)) and the point c·s: between the grid's ends the point moves
with the scale by c − t, at the ends by c. The points are the grid's own, so what is trained is what ships.

Axes: N blocks, B weights in a block.
"""

from __future__ import annotations

from typing import Any

import torch

from lmdistill.quantization.grid import Grid, Scales


class _LearnedScales(torch.autograd.Function):  # type: ignore[misc]
    """Points from weights and scales; the scales' names travel beside them."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        grid: Grid,
        fixed: Scales,
        names: tuple[str, ...],
        dtype: torch.dtype | None,
        *learned: torch.Tensor,
    ) -> torch.Tensor:
        """The grid's own points, with scales as its file can hold them."""
        scales = {**fixed, **dict(zip(names, learned, strict=True))}
        ctx.grid, ctx.fixed, ctx.names = grid, fixed, names
        ctx.save_for_backward(weights, *learned)
        return grid.fake_quantise(weights.detach(), scales, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Straight to the weights; by parts of the blocks to the scales."""
        weights, *learned = ctx.saved_tensors
        scales = {**ctx.fixed, **dict(zip(ctx.names, learned, strict=True))}
        found = scale_gradients(ctx.grid, grad, weights, scales, ctx.names)
        return (grad.to(weights.dtype), None, None, None, None, *found)


def scale_gradients(
    grid: Grid, grad: torch.Tensor, weights: torch.Tensor, scales: Scales, names: tuple[str, ...]
) -> list[torch.Tensor]:
    """The gradients of the scales called `names`, in their shapes, from that of the points."""
    found: list[list[torch.Tensor]] = [[] for _ in names]
    by_block = grid.by_block(grid.stored(scales))
    for rows in grid.chunks(weights):
        own = {name: scale[rows] for name, scale in by_block.items()}
        grad_NB, weights_NB = (one.reshape(-1, grid.block)[rows].float() for one in (grad, weights))
        for kept, part in zip(found, grid.scale_gradients(grad_NB, weights_NB, own, names), strict=True):
            kept.append(part)
    return [_shaped(torch.cat(parts), scales[name].shape) for name, parts in zip(names, found, strict=True)]


def _shaped(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A gradient by blocks in its scale's shape: what all blocks share gets the sum of theirs."""
    return grad.view(shape) if grad.numel() == shape.numel() else grad.sum(0)


def learned_points(
    grid: Grid,
    weights: torch.Tensor,
    learned: Scales,
    fixed: Scales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Points of `weights`, differentiable in them (straight through) and in the `learned` scales.

    In the dtype of `weights`, or rounded to `dtype`.
    """
    names = tuple(learned)
    result: torch.Tensor = _LearnedScales.apply(weights, grid, fixed or {}, names, dtype, *learned.values())
    return result
