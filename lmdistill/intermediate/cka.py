"""Hidden states: linear centred kernel alignment, which asks only that positions are arranged alike.

Axes: R rows, T positions, D width.
"""

from __future__ import annotations

import torch

from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.registry import Positions, Sides, intermediate


def unit_lengths(states_RTD: torch.Tensor) -> torch.Tensor:
    """States of length √D, which is what a block's norm makes of them: no position owns a sum over positions."""
    return states_RTD * states_RTD.pow(2).mean(-1, keepdim=True).clamp_min(torch.finfo(states_RTD.dtype).tiny).rsqrt()


def _centred(states_RTD: torch.Tensor, counts_RT: torch.Tensor) -> torch.Tensor:
    """Without the mean over the row's positions that count; zero at the others."""
    counts_RT1 = counts_RT[..., None].to(states_RTD.dtype)
    mean_R1D = (states_RTD * counts_RT1).sum(1, keepdim=True) / counts_RT1.sum(1, keepdim=True).clamp_min(1)
    return (states_RTD - mean_R1D) * counts_RT1


def linear_cka(one_RTD: torch.Tensor, other_RTD: torch.Tensor, counts_RT: torch.Tensor) -> torch.Tensor:
    """‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖) of each row `[R]`, from 0 to 1: the same after rotating or scaling a side."""
    x_RTD, y_RTE = _centred(one_RTD, counts_RT), _centred(other_RTD, counts_RT)
    if x_RTD.shape[1] <= max(x_RTD.shape[2], y_RTE.shape[2]):  # few positions: through their products
        x_RTT, y_RTT = x_RTD @ x_RTD.mT, y_RTE @ y_RTE.mT
        cross_R = (x_RTT * y_RTT).sum((1, 2))
        own_R = x_RTT.norm(dim=(1, 2)) * y_RTT.norm(dim=(1, 2))
    else:
        cross_R = (x_RTD.mT @ y_RTE).pow(2).sum((1, 2))
        own_R = (x_RTD.mT @ x_RTD).norm(dim=(1, 2)) * (y_RTE.mT @ y_RTE).norm(dim=(1, 2))
    return cross_R / own_R.clamp_min(torch.finfo(own_R.dtype).tiny)


@intermediate("hidden_cka", reads="hidden")
class HiddenCka(torch.nn.Module):  # type: ignore[misc]
    """1 − linear CKA of a row's hidden states, lengths set aside: blind to rotations, so any two widths compare."""

    def __init__(self, sides: Sides, keys: IntermediateKeys) -> None:
        super().__init__()

    def forward(self, student_RTD: torch.Tensor, teacher_RTD: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The sum over rows, each with the weight of its positions that count; a row of one position says nothing."""
        cka_R = linear_cka(unit_lengths(student_RTD), unit_lengths(teacher_RTD), positions.counts_RT)
        counts_R = positions.counts_RT.sum(1)
        return ((1.0 - cka_R) * counts_R).where(counts_R > 1, 0.0).sum()
