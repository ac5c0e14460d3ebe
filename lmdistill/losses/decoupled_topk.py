"""Tempered, decoupled top-K distillation (LFM2, arXiv 2511.23404) with its gradient in closed form.

With S the teacher's top K, P = p(S), Q = q(S):

    L = P·log(P/Q) + (1−P)·log((1−P)/(1−Q))  +  [P]·KL(softmax(log p_S/τ) ‖ softmax(z_S/τ))·[τ²]

The temperature acts on the conditional inside S only, never on the mass. At τ=1 with the factor P this is
the KL of the two (K+1)-bin distributions, hence at most the full KL, with equality at K=V.
Gradient: for v∉S `−(Q−P)·q_v/(1−Q)`; for v∈S `(Q−P)·q_v/Q + (P/τ)(q̃_v − p̃_v)`.

Axes: N positions, K cached entries (where their number varies, absent ones have log-prob −inf).
"""

from __future__ import annotations

import torch

from lmdistill.losses.cells import head_and_rest, in_logits, renormalised
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


@loss("decoupled_topk", signals="top_k", options=("temperature", "mass_weighted", "hinton_scaled"))
def decoupled_topk(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """The mass term at temperature 1 plus the tempered conditional term (LFM2 §3, our closed form)."""
    mass, inner = head_and_rest(student, targets), renormalised(student, targets, options.temperature)
    weight_N = mass.p_NC[:, 0] if options.mass_weighted else torch.ones_like(student.lse_N)
    scale_N = weight_N * options.kl_scale
    loss_N = mass.forward_NC.sum(-1) + scale_N * inner.forward_NC.sum(-1)
    share_NK = torch.softmax(student.logits_NK, -1)  # q_v/Q
    inside_NK = mass.excess_NC[:, :1] * share_NK + (scale_N / options.temperature)[:, None] * inner.excess_NC
    return in_logits(loss_N, torch.cat([inside_NK, mass.excess_NC[:, 1:]], 1), student, targets)
