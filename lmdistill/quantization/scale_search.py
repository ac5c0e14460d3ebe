"""The scale searches of llama.cpp's K-quants over many sub-blocks at once, in the reference's order of operations.

Both try a list of step widths, round the weights to codes with each, fit scale (and minimum) to those codes by least
squares, and keep the fit that is better than the best before it. Every sum runs over a sub-block's weights one after
the other and nothing is fused, as in the reference's x86 build; that is why sub-blocks are columns here.

Axes: M weights in a sub-block, N sub-blocks, S sums that run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmdistill.quantization.arithmetic import divide, ordered_sum, signed_extreme

_ALL_ZERO = 1e-15  # below this magnitude a sub-block of Q6_K counts as empty


@dataclass(frozen=True)
class AffineFit:
    """Points scale · code − minimum for each sub-block, and the codes the search had with them."""

    scale_N: torch.Tensor
    minimum_N: torch.Tensor  # at least 0: what is taken off
    codes_MN: torch.Tensor


@dataclass(frozen=True)
class LinearFit:
    """Points scale · (code − half) for each sub-block, and the codes the search had with them."""

    scale_N: torch.Tensor
    codes_MN: torch.Tensor


def _finite(steps_N: torch.Tensor) -> torch.Tensor:
    """An infinite inverse step gives code 0 everywhere in C (0 · ∞ and ∞ become 0); an inverse of 0 does so here."""
    return torch.where(steps_N.isinf(), 0.0, steps_N)


def _affine_codes(x_MN: torch.Tensor, low_N: torch.Tensor, inverse_N: torch.Tensor, top: int) -> torch.Tensor:
    return (x_MN - low_N).mul_(_finite(inverse_N)).round_().clamp_(0, top)


def _squared_error(
    x_MN: torch.Tensor, weight_MN: torch.Tensor, codes_MN: torch.Tensor, scale_N: torch.Tensor, low_N: torch.Tensor
) -> torch.Tensor:
    off_MN = (codes_MN * scale_N).add_(low_N).sub_(x_MN)
    return ordered_sum(off_MN.mul_(off_MN).mul_(weight_MN))


class _AffineSearch:
    """The state of one search; `low` is what the reference calls min, which later trials start from."""

    def __init__(self, x_MN: torch.Tensor, weight_MN: torch.Tensor, top: int) -> None:
        self.x_MN, self.weight_MN, self.top = x_MN, weight_MN, top
        self.sum_w_N = ordered_sum(weight_MN)
        self.sum_x_N = ordered_sum(weight_MN * x_MN)
        self.high_N = x_MN.amax(0)
        self.low_N = x_MN.amin(0).clamp_(max=0.0)
        self.flat_N = self.high_N == self.low_N
        self.inverse_N = divide(float(top), self.high_N - self.low_N)
        self.scale_N = divide(1.0, self.inverse_N)
        self.from_N = self.low_N  # with inverse_N: what the kept codes were counted with
        codes_MN = _affine_codes(x_MN, self.low_N, self.inverse_N, top)
        self.error_N = _squared_error(x_MN, weight_MN, codes_MN, self.scale_N, self.low_N)
        self.terms_MSN = x_MN.new_empty(len(x_MN), 3, x_MN.shape[1])

    def attempt(self, steps: float) -> None:
        """Fit with `steps` steps over the range, and keep that where it is better."""
        inverse_N = divide(steps, self.high_N - self.low_N)
        codes_MN = _affine_codes(self.x_MN, self.low_N, inverse_N, self.top)
        scale_N, low_N, solvable_N = self._solve(codes_MN)
        error_N = _squared_error(self.x_MN, self.weight_MN, codes_MN, scale_N, low_N)
        better_N = solvable_N & (error_N < self.error_N)
        self.inverse_N = torch.where(better_N, inverse_N, self.inverse_N)
        self.from_N = torch.where(better_N, self.low_N, self.from_N)
        self.error_N = torch.where(better_N, error_N, self.error_N)
        self.scale_N = torch.where(better_N, scale_N, self.scale_N)
        self.low_N = torch.where(better_N, low_N, self.low_N)

    def _solve(self, codes_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weighted least squares of x on the codes, the minimum held at or below 0; where the system has a solution."""
        wl_MN, wll_MN, wxl_MN = self.terms_MSN.unbind(1)
        torch.mul(self.weight_MN, codes_MN, out=wl_MN)
        torch.mul(wl_MN, codes_MN, out=wll_MN)
        torch.mul(wl_MN, self.x_MN, out=wxl_MN)
        sum_l_N, sum_ll_N, sum_xl_N = ordered_sum(self.terms_MSN).unbind()
        determinant_N = self.sum_w_N * sum_ll_N - sum_l_N * sum_l_N
        scale_N = (self.sum_w_N * sum_xl_N - self.sum_x_N * sum_l_N) / determinant_N
        low_N = (sum_ll_N * self.sum_x_N - sum_l_N * sum_xl_N) / determinant_N
        above_N = low_N > 0
        scale_N = torch.where(above_N, sum_xl_N / sum_ll_N, scale_N)
        return scale_N, torch.where(above_N, 0.0, low_N), determinant_N > 0

    def result(self) -> AffineFit:
        """The best fit; a sub-block of one value at or below 0 is its minimum alone."""
        codes_MN = _affine_codes(self.x_MN, self.from_N, self.inverse_N, self.top)
        codes_MN = torch.where(self.flat_N, 0.0, codes_MN)
        # after the first, better, fit `low` of a flat block would be NaN: no fit is ever better than NaN there
        return AffineFit(torch.where(self.flat_N, 0.0, self.scale_N), -self.low_N, codes_MN)


def affine_fit(
    x_MN: torch.Tensor, weight_MN: torch.Tensor, *, top: int, first: float, delta: float, trials: int
) -> AffineFit:
    """Scale and minimum for codes 0…top, weighted; trial i counts top + first + i · delta steps over the range."""
    search = _AffineSearch(x_MN, weight_MN, top)
    for trial in range(trials):
        steps = (np.float32(first) + np.float32(delta) * np.float32(trial)) + np.float32(top)
        search.attempt(float(steps))
    return search.result()


def linear_fit(x_MN: torch.Tensor, *, half: int, trials: Sequence[int], delta: float) -> LinearFit:
    """Scale of either sign for codes 0…2·half−1, weighted by x²; trial i has half + i · delta steps to the extreme."""
    extreme_N = signed_extreme(x_MN, 0).squeeze(0)
    xx_MN = x_MN * x_MN
    xxx_MN = xx_MN * x_MN
    terms_MSN = x_MN.new_empty(len(x_MN), 2, x_MN.shape[1])

    def codes(inverse_N: torch.Tensor) -> torch.Tensor:
        return (x_MN * inverse_N).round_().clamp_(-half, half - 1)

    def sums(codes_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lx_MN, ll_MN = terms_MSN.unbind(1)
        torch.mul(xxx_MN, codes_MN, out=lx_MN)
        torch.mul(xx_MN, codes_MN, out=ll_MN).mul_(codes_MN)
        sum_lx_N, sum_ll_N = ordered_sum(terms_MSN).unbind()
        return sum_lx_N, sum_ll_N

    kept_N = divide(float(-half), extreme_N)
    sum_lx_N, sum_ll_N = sums(codes(kept_N))
    scale_N = torch.where(sum_ll_N == 0, 0.0, sum_lx_N / sum_ll_N)
    best_N = scale_N * sum_lx_N
    for trial in trials:
        inverse_N = divide(-float(np.float32(half) + np.float32(delta) * np.float32(trial)), extreme_N)
        sum_lx_N, sum_ll_N = sums(codes(inverse_N))
        better_N = (sum_ll_N > 0) & (sum_lx_N * sum_lx_N > best_N * sum_ll_N)
        fitted_N = sum_lx_N / sum_ll_N
        kept_N = torch.where(better_N, inverse_N, kept_N)
        scale_N = torch.where(better_N, fitted_N, scale_N)
        best_N = torch.where(better_N, fitted_N * sum_lx_N, best_N)
    empty_N = extreme_N.abs() < np.float32(_ALL_ZERO).item()
    codes_MN = torch.where(empty_N, 0.0, codes(kept_N) + half)
    return LinearFit(torch.where(empty_N, 0.0, scale_N), codes_MN)
