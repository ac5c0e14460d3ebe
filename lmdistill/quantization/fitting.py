"""Scales and codes that fit better than the reference's: a search that weighs inputs, and rounding that makes good.

Both lead to ordinary points of the grid: only which ones are taken differs.

Axes: N blocks, B weights in a block, O outputs, D inputs of a layer, C of them at once.
"""

from __future__ import annotations

import torch

from lmdistill.quantization.grid import Grid, Scales

_FACTORS = tuple(round(0.60 + 0.02 * i, 2) for i in range(26))  # of the reference's scale: 0.60 … 1.10
_DAMPING = 0.01  # of the mean of the moment's diagonal, added to it
_COLUMNS = 128  # whose errors are made good at once in the columns after them


def fitted_scales(
    grid: Grid, weights: torch.Tensor, importance_D: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The scales of those tried that have the least squared error, weighted by inputs' mean squares where given.

    The reference's scales times factors of either sign are tried block by block, K-quants' by their block's scale.
    """
    blocks_NB = weights.detach().reshape(-1, grid.block)
    weight_NB = _spread(importance_D, weights, grid.block)
    start = grid.by_block(grid.quantise(weights).scales)
    parts = []
    for rows in grid.chunks(weights):
        own = {name: scale[rows] for name, scale in start.items()}
        parts.append(_best(grid, blocks_NB[rows].float(), own, None if weight_NB is None else weight_NB[rows]))
    best = {name: torch.cat([part[name] for part in parts]) for name in start}
    return grid.by_row(grid.stored(best), weights.shape)


def _best(
    grid: Grid, blocks_NB: torch.Tensor, start: Scales, weight_NB: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The scales of some blocks, from those that the reference has for them."""
    floats = [name for name, scale in start.items() if scale.is_floating_point()]
    best = {name: scale.clone() for name, scale in start.items()}
    best_N = _error(grid, blocks_NB, best, weight_NB)
    signs = (1.0, -1.0) if grid.either_sign else (1.0,)
    for factor in (sign * size for sign in signs for size in _FACTORS):
        tried = {name: scale * factor if name in floats else scale for name, scale in start.items()}
        error_N = _error(grid, blocks_NB, grid.stored(tried), weight_NB)
        better_N = error_N < best_N
        best_N = torch.where(better_N, error_N, best_N)
        for name in floats:
            best[name] = torch.where(better_N, tried[name], best[name])
    return best


def _spread(importance_D: torch.Tensor | None, weights: torch.Tensor, block: int) -> torch.Tensor | None:
    """Each weight's importance, in blocks."""
    if importance_D is None:
        return None
    return importance_D.float().expand(weights.shape).reshape(-1, block)


def _error(grid: Grid, blocks_NB: torch.Tensor, scales: Scales, weight_NB: torch.Tensor | None) -> torch.Tensor:
    off_NB = grid.points(grid.nearest(blocks_NB, scales), scales).sub_(blocks_NB).pow_(2)
    return (off_NB if weight_NB is None else off_NB.mul_(weight_NB)).sum(1)


def compensated(grid: Grid, weights_OD: torch.Tensor, scales: Scales, second_DD: torch.Tensor) -> torch.Tensor:
    """Weights whose points have outputs nearest to the given weights' own: columns make good the errors before them.

    That is GPTQ (arXiv 2210.17323, section 3) with scales chosen beforehand, so that columns can go in the order of
    their inputs' size: the errors of those that matter most find the most columns to make them good. `second_DD` is the
    second moment of the layer's inputs. Returns `[O, D]` as they are before they are rounded, so that `grid` with
    `scales` gives GPTQ's points, and training finds them as far from the next point as weights are, not all at half a
    step.
    """
    order_D = second_DD.diagonal().argsort(descending=True, stable=True)
    left_OD = weights_OD.detach().float()[:, order_D]
    inverse_DD = _inverse_root(second_DD.float()[order_D][:, order_D])
    width, places = left_OD.shape[1], order_D.tolist()
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors_OC = torch.empty_like(left_OD[:, start:end])
        for column in range(start, end):
            points_O = _column_points(grid, left_OD[:, column], scales, places[column])
            error_O = (left_OD[:, column] - points_O) / inverse_DD[column, column]
            left_OD[:, column + 1 : end].addr_(error_O, inverse_DD[column, column + 1 : end], alpha=-1)
            errors_OC[:, column - start] = error_O
        left_OD[:, end:] -= errors_OC @ inverse_DD[start:end, end:]
    found_OD = torch.empty_like(left_OD)
    found_OD[:, order_D] = left_OD
    return found_OD


def _column_points(grid: Grid, weights_O: torch.Tensor, scales: Scales, column: int) -> torch.Tensor:
    """The points of one column's weights, each on its own block's scales."""
    block, inside = divmod(column, grid.block)
    blocks_OB = weights_O.unsqueeze(1).repeat(1, grid.block)
    own = {name: scale[:, block] for name, scale in scales.items()}
    return grid.points(grid.nearest(blocks_OB, own), own)[:, inside]


def _inverse_root(second_DD: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moment's inverse; inputs that never are anything count as alone."""
    diagonal_D = second_DD.diagonal().clone()
    damped_DD = second_DD.clone()
    damped_DD.diagonal().add_(_DAMPING * diagonal_D.mean()).add_((diagonal_D == 0).float())
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(damped_DD.double()))
    upper_DD: torch.Tensor = torch.linalg.cholesky(inverse_DD, upper=True).float()
    return upper_DD
