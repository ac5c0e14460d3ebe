"""Teacher and student on the cells that a cache knows: the K cached ids and, as one more cell, the rest.

A divergence of the coarsened distributions (`divergences.py`) is at most the one over the vocabulary (the
data-processing inequality), with equality where K is the vocabulary. With g the gradient in the cells' logits,
where the rest's logit is its logsumexp, the gradient in the student's logits is

    v ∈ S: g_v        v ∉ S: g_rest·q_v/q_rest

Axes: N positions, K cached entries, C cells: K+1, or K where the rest is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, absent_as_first


@dataclass(frozen=True)
class Cells:
    """Two distributions on the same cells as log-probs `[N, C]`; absent entries have −inf in both."""

    log_p_NC: torch.Tensor
    log_q_NC: torch.Tensor

    @cached_property
    def p_NC(self) -> torch.Tensor:
        """The teacher's."""
        return self.log_p_NC.exp()

    @cached_property
    def q_NC(self) -> torch.Tensor:
        """The student's."""
        return self.log_q_NC.exp()

    @cached_property
    def apart_NC(self) -> torch.Tensor:
        """log p − log q; 0 at absent entries."""
        return (self.log_p_NC - self.log_q_NC).masked_fill(self.log_p_NC == -torch.inf, 0.0)

    @cached_property
    def excess_NC(self) -> torch.Tensor:
        """q − p from the logs' difference: two probabilities near one keep the digits in which they differ."""
        shrink_NC = torch.expm1(-self.apart_NC.abs())
        return shrink_NC * torch.where(self.apart_NC > 0, self.p_NC, -self.q_NC)

    def log_mix(self, share: float) -> torch.Tensor:
        """log(m/q) of the mixture m = share·p + (1−share)·q, `[N, C]`; nothing overflows where q is tiny."""
        shrink_NC = torch.expm1(-self.apart_NC.abs())
        mostly_p_NC = self.apart_NC + torch.log1p((1.0 - share) * shrink_NC)
        return torch.where(self.apart_NC > 0, mostly_p_NC, torch.log1p(share * shrink_NC))


def entropy(log_NC: torch.Tensor, rest_ids_N: torch.Tensor) -> torch.Tensor:
    """Entropy `[N]` in nats of cells whose last one is spread evenly over `rest_ids_N` ids: the most it can be."""
    p_NC = log_NC.exp()
    return p_NC[:, -1] * rest_ids_N.log() - (p_NC * log_NC.masked_fill(log_NC == -torch.inf, 0.0)).sum(-1)


def _log_softmax(logits_NC: torch.Tensor) -> torch.Tensor:
    """log-softmax that keeps the digits of a log-prob near 0: the others are summed without the largest."""
    max_N1, at_N1 = logits_NC.max(-1, keepdim=True)
    shifted_NC = logits_NC - max_N1
    others_N1 = shifted_NC.exp().scatter(1, at_N1, 0.0).sum(-1, keepdim=True)
    return shifted_NC - others_N1.log1p()


def _with_rest(logits_NK: torch.Tensor, rest_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of K+1 cells. A rest of no mass, as where K is the vocabulary, gets the smallest there is."""
    log_NC = _log_softmax(torch.cat([logits_NK, rest_N[:, None]], 1) / temperature)
    log_NC[:, -1].clamp_min_(torch.tensor(torch.finfo(log_NC.dtype).tiny).log().item())
    return log_NC


def with_rest(student: StudentSoftmax, targets: Targets, temperature: float = 1.0) -> Cells:
    """The K entries and the rest, each cell's log-mass divided by the temperature."""
    return Cells(
        _with_rest(targets.logp_NK, targets.tail_N, temperature),
        _with_rest(student.logits_NK, student.lse_rest_N, temperature),
    )


def renormalised(student: StudentSoftmax, targets: Targets, temperature: float) -> Cells:
    """The K entries alone, made to sum to one."""
    return Cells(_log_softmax(targets.logp_NK / temperature), _log_softmax(student.logits_NK / temperature))


def divergence(
    cells: Cells, loss_NC: torch.Tensor, slope_NC: torch.Tensor, student: StudentSoftmax, targets: Targets
) -> LossTerms:
    """The sum of `loss_NC`, with its gradient from `slope_NC`: q times the derivative in q, up to a multiple of q.

    The multiple is chosen that leaves the student's largest cell without a slope: where q is near one there, its
    gradient is then a sum of small numbers and not a difference of large ones.
    """
    peak_N1 = cells.log_q_NC.argmax(-1, keepdim=True)
    slope_NC = slope_NC - cells.q_NC * (slope_NC.gather(1, peak_N1) / cells.q_NC.gather(1, peak_N1))
    slope_NC = slope_NC.scatter(1, peak_N1, 0.0)
    grad_NC = slope_NC - cells.q_NC * slope_NC.sum(-1, keepdim=True)
    return in_logits(loss_NC.sum(-1), grad_NC, student, targets)


def tempered_kl(cells: Cells, options: LossOptions, student: StudentSoftmax, targets: Targets) -> LossTerms:
    """KL(p‖q) of cells whose logits were divided by the temperature, times its square where Hinton's scale is on."""
    grad_NC = options.kl_scale / options.temperature * cells.excess_NC
    return in_logits(options.kl_scale * (cells.p_NC * cells.apart_NC).sum(-1), grad_NC, student, targets)


def in_logits(loss_N: torch.Tensor, grad_NC: torch.Tensor, student: StudentSoftmax, targets: Targets) -> LossTerms:
    """Terms of a loss whose gradient in the cells' logits is `grad_NC`, of K cells or of K+1."""
    entries = targets.ids_NK.shape[1]
    inside_NK = absent_as_first(grad_NC[:, :entries], targets)
    if grad_NC.shape[1] == entries:
        return LossTerms(loss_N, torch.zeros_like(loss_N), targets.ids_NK, inside_NK)
    rest_q_N = (student.lse_rest_N - student.lse_N).exp().clamp_min(torch.finfo(loss_N.dtype).tiny)
    return LossTerms(loss_N, grad_NC[:, -1] / rest_q_N, targets.ids_NK, inside_NK)
