"""Teacher and student on the cells that a cache knows: the K cached ids and, as one more cell, the rest.

A divergence of the coarsened distributions (`divergences.py`) is at most the one over the vocabulary (the
data-processing inequality), with equality where K is the vocabulary. With g the gradient in the cells' logits,
where the rest's logit is its logsumexp, the gradient in the student's logits is

    v ∈ S: g_v        v ∉ S: g_rest·q_v/q_rest

Axes: N positions, K cached entries, C cells: K+1, or K where the rest is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, absent_as_first


@dataclass(frozen=True)
class Cells:
    """Two distributions on the same cells as log-probs `[N, C]`; absent entries have −inf in both.

    `apart_NC` is log p − log q, 0 at absent entries: it has digits where the two differ by less than a log-prob's last.
    """

    log_p_NC: torch.Tensor
    log_q_NC: torch.Tensor
    apart_NC: torch.Tensor

    @cached_property
    def p_NC(self) -> torch.Tensor:
        """The teacher's."""
        return self.log_p_NC.exp()

    @cached_property
    def q_NC(self) -> torch.Tensor:
        """The student's."""
        return self.log_q_NC.exp()

    @cached_property
    def excess_NC(self) -> torch.Tensor:
        """q − p from the logs' difference: two probabilities near one keep the digits in which they differ."""
        return _excess(self.apart_NC, self.p_NC, self.q_NC)

    @cached_property
    def forward_NC(self) -> torch.Tensor:
        """KL(p‖q) by cell, p·log(p/q) + q − p: what is added sums to zero, and no cell is below it but for rounding.

        The first terms alone are of both signs and cancel where the two are near each other.
        """
        return self.p_NC * self.apart_NC + self.excess_NC

    def gradient(self, slope_NC: torch.Tensor) -> torch.Tensor:
        """A divergence's gradient in the cells' logits from its slope: q times the derivative in q, up to a multiple.

        The multiple of q is chosen that leaves the student's largest cell without a slope: where q is near one there,
        its gradient is then a sum of small numbers and not a difference of large ones.
        """
        peak_N1 = self.log_q_NC.argmax(-1, keepdim=True)
        slope_NC = slope_NC - self.q_NC * (slope_NC.gather(1, peak_N1) / self.q_NC.gather(1, peak_N1))
        slope_NC = slope_NC.scatter(1, peak_N1, 0.0)
        return slope_NC - self.q_NC * slope_NC.sum(-1, keepdim=True)

    def log_mix(self, share: float) -> torch.Tensor:
        """log(m/q) of the mixture m = share·p + (1−share)·q, `[N, C]`; nothing overflows where q is tiny."""
        shrink_NC = torch.expm1(-self.apart_NC.abs())
        mostly_p_NC = self.apart_NC + torch.log1p((1.0 - share) * shrink_NC)
        return torch.where(self.apart_NC > 0, mostly_p_NC, torch.log1p(share * shrink_NC))


def entropy(log_NC: torch.Tensor, rest_ids_N: torch.Tensor) -> torch.Tensor:
    """Entropy `[N]` in nats of cells whose last one is spread evenly over `rest_ids_N` ids: the most it can be."""
    p_NC = log_NC.exp()
    return p_NC[:, -1] * rest_ids_N.log() - (p_NC * log_NC.masked_fill(log_NC == -torch.inf, 0.0)).sum(-1)


def _excess(apart_NC: torch.Tensor, p_NC: torch.Tensor, q_NC: torch.Tensor) -> torch.Tensor:
    """q − p of two that are `apart_NC` = log p − log q."""
    return torch.expm1(-apart_NC.abs()) * torch.where(apart_NC > 0, p_NC, -q_NC)


def _shifted(logits_NC: torch.Tensor, rest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits less their maximum `[N, C]`, and log Σ exp of those `[N, 1]`, near 0 with all its digits.

    A rest of no mass, as where K is the vocabulary, gets the smallest there is.
    """
    max_N1, at_N1 = logits_NC.max(-1, keepdim=True)
    shifted_NC = logits_NC - max_N1
    if rest:
        shifted_NC[:, -1].clamp_min_(math.log(torch.finfo(logits_NC.dtype).tiny))
    return shifted_NC, shifted_NC.exp().scatter(1, at_N1, 0.0).sum(-1, keepdim=True).log1p()


def _cells(logits_p_NC: torch.Tensor, logits_q_NC: torch.Tensor, rest: bool) -> Cells:
    """Both distributions from their logits.

    The logs' difference is not that of the two log-probs, which have lost the digits below their own last: with Z the
    sums of the shifted exponentials it is that of the shifted logits less log(Z_p/Z_q) = ±log1p(|Z_p − Z_q|/min Z).
    """
    (shifted_p_NC, norm_p_N1), (shifted_q_NC, norm_q_N1) = (_shifted(one, rest) for one in (logits_p_NC, logits_q_NC))
    apart_NC = (shifted_p_NC - shifted_q_NC).masked_fill(shifted_p_NC == -torch.inf, 0.0)
    more_p_N1 = -_excess(apart_NC, shifted_p_NC.exp(), shifted_q_NC.exp()).sum(-1, keepdim=True)
    lesser_N1 = torch.minimum(norm_p_N1, norm_q_N1).exp()
    apart_NC = apart_NC - more_p_N1.sign() * (more_p_N1.abs() / lesser_N1).log1p()
    apart_NC = apart_NC.masked_fill(shifted_p_NC == -torch.inf, 0.0)
    return Cells(shifted_p_NC - norm_p_N1, shifted_q_NC - norm_q_N1, apart_NC)


def with_rest(student: StudentSoftmax, targets: Targets, temperature: float = 1.0) -> Cells:
    """The K entries and the rest, each cell's log-mass divided by the temperature."""
    p_NC = torch.cat([targets.logp_NK, targets.tail_N[:, None]], 1)
    q_NC = torch.cat([student.logits_NK, student.lse_rest_N[:, None]], 1)
    return _cells(p_NC / temperature, q_NC / temperature, rest=True)


def head_and_rest(student: StudentSoftmax, targets: Targets) -> Cells:
    """Two cells: the mass inside S, and the rest."""
    p_NC = torch.stack([targets.logp_NK.logsumexp(-1), targets.tail_N], 1)
    return _cells(p_NC, torch.stack([student.logits_NK.logsumexp(-1), student.lse_rest_N], 1), rest=True)


def renormalised(student: StudentSoftmax, targets: Targets, temperature: float) -> Cells:
    """The K entries alone, made to sum to one."""
    return _cells(targets.logp_NK / temperature, student.logits_NK / temperature, rest=False)


def divergence(
    cells: Cells, loss_NC: torch.Tensor, slope_NC: torch.Tensor, student: StudentSoftmax, targets: Targets
) -> LossTerms:
    """The sum of `loss_NC`, with its gradient from `slope_NC`."""
    return in_logits(loss_NC.sum(-1), cells.gradient(slope_NC), student, targets)


def tempered_kl(cells: Cells, options: LossOptions, student: StudentSoftmax, targets: Targets) -> LossTerms:
    """KL(p‖q) of cells whose logits were divided by the temperature, times its square where Hinton's scale is on."""
    grad_NC = options.kl_scale / options.temperature * cells.excess_NC
    return in_logits(options.kl_scale * cells.forward_NC.sum(-1), grad_NC, student, targets)


def in_logits(loss_N: torch.Tensor, grad_NC: torch.Tensor, student: StudentSoftmax, targets: Targets) -> LossTerms:
    """Terms of a loss whose gradient in the cells' logits is `grad_NC`, of K cells or of K+1."""
    entries = targets.ids_NK.shape[1]
    inside_NK = absent_as_first(grad_NC[:, :entries], targets)
    if grad_NC.shape[1] == entries:
        return LossTerms(loss_N, torch.zeros_like(loss_N), targets.ids_NK, inside_NK)
    rest_q_N = (student.lse_rest_N - student.lse_N).exp().clamp_min(torch.finfo(loss_N.dtype).tiny)
    return LossTerms(loss_N, grad_NC[:, -1] / rest_q_N, targets.ids_NK, inside_NK)
