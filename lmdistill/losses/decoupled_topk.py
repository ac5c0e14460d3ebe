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

from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, absent_as_first, loss


def _log_mass(log_head_N: torch.Tensor, log_rest_N: torch.Tensor) -> torch.Tensor:
    """log of the mass inside S: from the rest where that is the smaller number, else from its own logsumexp."""
    rest_N = log_rest_N.exp()
    return torch.where(rest_N < 0.5, torch.log1p(-rest_N.clamp_max(0.5)), log_head_N)


def _masses(student: StudentSoftmax, targets: Targets) -> tuple[torch.Tensor, ...]:
    """log P, log(1−P), log Q, log(1−Q) `[N]`; the rests have a logsumexp of their own, never `log(1 − sum)`."""
    log_rest_q_N = student.lse_rest_N - student.lse_N
    log_p_N = _log_mass(targets.logp_NK.logsumexp(-1), targets.tail_N)
    log_q_N = _log_mass(student.logits_NK.logsumexp(-1) - student.lse_N, log_rest_q_N)
    return log_p_N, targets.tail_N, log_q_N, log_rest_q_N


@loss("decoupled_topk", signals="top_k", options=("temperature", "mass_weighted", "hinton_scaled"))
def decoupled_topk(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """The mass term at temperature 1 plus the tempered conditional term (LFM2 §3, our closed form)."""
    tau = options.temperature
    log_p_N, log_rest_p_N, log_q_N, log_rest_q_N = _masses(student, targets)
    p_N, rest_p_N, q_N, rest_q_N = log_p_N.exp(), log_rest_p_N.exp(), log_q_N.exp(), log_rest_q_N.exp()
    # Where K covers the vocabulary there is no rest: 0·(−inf − −inf) is 0 here, not NaN.
    rest_term_N = torch.where(rest_p_N > 0, rest_p_N * (log_rest_p_N - log_rest_q_N), 0.0)
    mass_N = p_N * (log_p_N - log_q_N) + rest_term_N

    log_pt_NK = torch.log_softmax(targets.logp_NK / tau, -1)
    log_qt_NK = torch.log_softmax(student.logits_NK / tau, -1)
    pt_NK, qt_NK = log_pt_NK.exp(), log_qt_NK.exp()
    scale_N = (p_N if options.mass_weighted else torch.ones_like(p_N)) * (tau**2 if options.hinton_scaled else 1.0)
    apart_NK = (log_pt_NK - log_qt_NK).masked_fill(targets.absent_NK, 0.0)  # −inf − −inf counts nothing
    conditional_N = scale_N * (pt_NK * apart_NK).sum(-1)

    # Q − P = (1−P) − (1−Q): the rests are the small numbers where the masses are near one.
    excess_N = torch.where(p_N > 0.5, rest_p_N - rest_q_N, q_N - p_N)
    tiny = torch.finfo(rest_q_N.dtype).tiny
    outside_N = torch.where(log_rest_q_N > -torch.inf, -excess_N / rest_q_N.clamp_min(tiny), 0.0)
    share_NK = torch.softmax(student.logits_NK, -1)  # q_v/Q
    inside_NK = excess_N[:, None] * share_NK + (scale_N / tau)[:, None] * (qt_NK - pt_NK)
    return LossTerms(mass_N + conditional_N, outside_N, targets.ids_NK, absent_as_first(inside_NK, targets))
