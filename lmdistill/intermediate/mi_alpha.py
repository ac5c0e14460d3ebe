"""MI-α: a lower bound on the mutual information of student and teacher states, with a learned critic.

Distiller (arXiv 2109.11105) takes the interpolated bound of Poole et al. (arXiv 1905.06922): with K samples x₁ … x_K of
the student, a teacher's state y that belongs to x₁, a critic f and a learned baseline q(y) > 0,

    a(y) = α·(1/K)·Σ_k e^f(x_k,y) + (1−α)·q(y)
    I ≥ 1 + E[ log e^f(x₁,y) / a(y) ] − E[ e^f(x₁,y) / a(y) ]

where y is independent of all x in the last term. Here each position of a group of N is once the y. In the first term
one of the other positions is left out (each in turn, averaged), in the last its own is: K = N−1 in both.

Axes: R rows, G positions of a group, i the student's position, j the teacher's, D width, W critic's width.
"""

from __future__ import annotations

import math

import torch

from lmdistill.intermediate.cka import unit_lengths
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.registry import Positions, Sides, intermediate


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf


def interpolated_bound(
    scores_Rij: torch.Tensor, baseline_Rj: torch.Tensor, counts_RG: torch.Tensor, alpha: float
) -> torch.Tensor:
    """The bound of each row in nats `[R]`: f(xᵢ, yⱼ), log q(yⱼ), and which of the N positions count; 0 where N < 3."""
    same_ij = torch.eye(counts_RG.shape[1], dtype=torch.bool, device=counts_RG.device)
    pairs_Rij = counts_RG[:, :, None] & counts_RG[:, None, :]
    others_Rij = pairs_Rij & ~same_ij
    enough_R = counts_RG.sum(1) >= 3
    counts_R = counts_RG.sum(1).clamp_min(3)
    log_k_R1 = (counts_R - 1).to(scores_Rij.dtype).log()[:, None]
    # What does not count is set to a finite low score: −∞ would make gradients of nothing but it into nan.
    low = torch.finfo(scores_Rij.dtype).min / 4
    joint_Rj = scores_Rij.diagonal(dim1=1, dim2=2)
    total_R1j = scores_Rij.masked_fill(~pairs_Rij, low).logsumexp(1, keepdim=True)
    share_Rij = (scores_Rij - total_R1j).masked_fill(~others_Rij, low).exp()
    # Of all but i: the sum less one of its terms, and never less than yⱼ's own term, which is always in it.
    rest_Rij = total_R1j + torch.log1p(-share_Rij.clamp(max=1 - torch.finfo(share_Rij.dtype).eps))
    rest_Rij = torch.maximum(rest_Rij, joint_Rj[:, None, :]) - log_k_R1[..., None]
    learned_Rj = baseline_Rj + _log(1 - alpha)
    mixed_Rij = torch.logaddexp(rest_Rij + _log(alpha), learned_Rj[:, None, :])
    first_Rj = ((joint_Rj[:, None, :] - mixed_Rij).where(others_Rij, 0.0)).sum(1) / (counts_R - 1)[:, None]
    apart_Rj = scores_Rij.masked_fill(~others_Rij, low).logsumexp(1) - log_k_R1
    second_Rj = (apart_Rj - torch.logaddexp(apart_Rj + _log(alpha), learned_Rj)).exp()
    bound_R = 1 + (first_Rj - second_Rj).where(counts_RG, 0.0).sum(1) / counts_R
    return bound_R.where(enough_R, 0.0)


class Critic(torch.nn.Module):  # type: ignore[misc]
    """f(x, y) as a scaled product of two small networks, and log q(y) from the second of them."""

    def __init__(self, sides: Sides, width: int) -> None:
        super().__init__()
        self.width = width
        self.student, self.teacher = _network(sides.student, width, width), _network(sides.teacher, width, width + 1)

    def forward(self, student_RGD: torch.Tensor, teacher_RGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[R, G, G]` of every student's state with every teacher's, and the baseline `[R, G]`."""
        x_RGW, y_RGW = self.student(student_RGD), self.teacher(teacher_RGD)
        return x_RGW @ y_RGW[..., :-1].mT / math.sqrt(self.width), y_RGW[..., -1]


def _network(inputs: int, hidden: int, outputs: int) -> torch.nn.Module:
    first, last = torch.nn.Linear(inputs, hidden), torch.nn.Linear(hidden, outputs)
    return torch.nn.Sequential(first, torch.nn.GELU(), last)


@intermediate("mi_alpha", reads="hidden", options=("alpha", "critic_width", "group", "head_lr"))
class MiAlpha(torch.nn.Module):  # type: ignore[misc]
    """Minus a lower bound on the mutual information of student and teacher states, with a critic that learns beside."""

    def __init__(self, sides: Sides, keys: IntermediateKeys) -> None:
        super().__init__()
        self.critic, self.alpha, self.group = Critic(sides, keys.critic_width), keys.alpha, keys.group

    def forward(self, student_RTD: torch.Tensor, teacher_RTD: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The sum over groups of positions, each with the weight of those that count."""
        total = student_RTD.new_zeros(())
        parts = zip(
            unit_lengths(student_RTD).split(self.group, 1),
            unit_lengths(teacher_RTD).split(self.group, 1),
            positions.counts_RT.split(self.group, 1),
            strict=True,
        )
        for student_RGD, teacher_RGD, counts_RG in parts:
            scores_Rij, baseline_Rj = self.critic(student_RGD, teacher_RGD)
            bound_R = interpolated_bound(scores_Rij, baseline_Rj, counts_RG, self.alpha)
            total = total - (bound_R * counts_RG.sum(1)).sum()
        return total
