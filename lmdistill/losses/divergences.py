"""Divergences of teacher and student on K+1 cells, the cached ids and the rest, all at temperature 1.

With p the teacher's and q the student's mass of a cell, and slopes q·∂D/∂q up to a multiple of q:

    forward_kl       Σ p·log(p/q)                                       q − p
    reverse_kl       Σ q·log(q/p)                                       q·log(q/p)
    js               β·KL(p‖m) + (1−β)·KL(q‖m),  m = β·p + (1−β)·q      (1−β)·q·log(q/m)
    skew_kl          KL(p‖m),  m = α·p + (1−α)·q                        (1−α)²·(q−p)·q/m
    skew_reverse_kl  KL(q‖m),  m = (1−α)·p + α·q                        q·log(q/m) + α·(q − q²/m)
    total_variation  ½·Σ |p − q|                                        ½·q·sign(q − p)

A KL has the difference of its two masses added to each cell, which sums to zero: where they are near each other, the
digits stay.
Each is at most the same divergence over the vocabulary. js is that of GKD (arXiv 2306.13649, section 2): divided by β
it tends to the forward KL for β → 0, divided by 1−β to the reverse one for β → 1. The skew ones are DistiLLM's
(arXiv 2402.03898, section 3.1).

Axes: N positions, C cells.
"""

from __future__ import annotations

import torch

from lmdistill.losses.cells import Cells, divergence, with_rest
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


def forward(cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and slope of KL(p‖q) by cell."""
    return cells.forward_NC, cells.excess_NC


def reverse(cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and slope of KL(q‖p) by cell."""
    slope_NC = -cells.q_NC * cells.apart_NC
    return slope_NC - cells.excess_NC, slope_NC


def mixed(cells: Cells, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and slope of β·KL(p‖m) + (1−β)·KL(q‖m) by cell."""
    log_mix_NC = cells.log_mix(beta)
    away_q_NC = (beta - 1.0) * cells.q_NC * log_mix_NC  # (1−β)·q·log(q/m)
    return beta * cells.p_NC * (cells.apart_NC - log_mix_NC) + away_q_NC, away_q_NC


def skewed(cells: Cells, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and slope of KL(p‖α·p + (1−α)·q) by cell."""
    log_mix_NC = cells.log_mix(alpha)
    slope_NC = (1.0 - alpha) ** 2 * cells.excess_NC * torch.exp(-log_mix_NC)
    return cells.p_NC * (cells.apart_NC - log_mix_NC) + (1.0 - alpha) * cells.excess_NC, slope_NC  # + m − p


def skewed_reverse(cells: Cells, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and slope of KL(q‖(1−α)·p + α·q) by cell."""
    log_mix_NC = cells.log_mix(1.0 - alpha)
    away_q_NC = -cells.q_NC * log_mix_NC  # q·log(q/m)
    slope_NC = away_q_NC - alpha * cells.q_NC * torch.expm1(-log_mix_NC)
    return away_q_NC - (1.0 - alpha) * cells.excess_NC, slope_NC  # + m − q


@loss("forward_kl", signals="top_k")
def forward_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(teacher ‖ student): the student must cover what the teacher may say."""
    cells = with_rest(student, targets)
    return divergence(cells, *forward(cells), student, targets)


@loss("reverse_kl", signals="top_k")
def reverse_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(student ‖ teacher): the student must not say what the teacher would not."""
    cells = with_rest(student, targets)
    return divergence(cells, *reverse(cells), student, targets)


@loss("js", signals="top_k", options=("js_beta",))
def js(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """Generalised Jensen-Shannon divergence with weight β on the teacher (GKD, section 2)."""
    cells = with_rest(student, targets)
    return divergence(cells, *mixed(cells, options.js_beta), student, targets)


@loss("skew_kl", signals="top_k", options=("skew_alpha",))
def skew_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(teacher ‖ α·teacher + (1−α)·student) (DistiLLM, section 3.1)."""
    cells = with_rest(student, targets)
    return divergence(cells, *skewed(cells, options.skew_alpha), student, targets)


@loss("skew_reverse_kl", signals="top_k", options=("skew_alpha",))
def skew_reverse_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(student ‖ (1−α)·teacher + α·student) (DistiLLM, section 3.1)."""
    cells = with_rest(student, targets)
    return divergence(cells, *skewed_reverse(cells, options.skew_alpha), student, targets)


@loss("total_variation", signals="top_k")
def total_variation(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """Half the sum of |p − q|: the share of tokens that must change; its gradient does not fade near the teacher."""
    cells = with_rest(student, targets)
    return divergence(cells, cells.excess_NC.abs() / 2, cells.q_NC * cells.excess_NC.sign() / 2, student, targets)
