"""The head fused with a loss: logits by chunks, gradients in the forward pass, never B·T·V.

Axes: N positions (all), C positions of one chunk, D hidden width, V vocabulary, K cached entries, S scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lmdistill.losses import cross_entropy
from lmdistill.losses.registry import LossFunction, LossOptions, LossTerms, StudentSoftmax, Targets


@dataclass(frozen=True)
class Mix:
    """`ce_weight · CE + kd_weight · KD`, both summed over the positions."""

    kd: LossFunction
    options: LossOptions
    kd_weight: float
    ce_weight: float


@dataclass(frozen=True)
class Sums:
    """Sums over positions in nats: the mixed loss (differentiable), and its two parts for the log."""

    total: torch.Tensor
    kd: torch.Tensor
    ce: torch.Tensor


def _softmax(logits_CV: torch.Tensor, targets: Targets) -> tuple[StudentSoftmax, torch.Tensor, torch.Tensor]:
    """The student's softmax of a chunk, `exp(z − max)` `[C, V]` in the logits' memory, and the maxima `[C]`.

    The mass outside the teacher's top K is summed by itself with those K set to zero: it is exact where it
    is small, which `1 − Q` would not be. Absent entries repeat an id and count as nothing.
    """
    absent_CK = targets.absent_NK
    whole_CV = None if targets.live is None else logits_CV.clone()
    logits_CK = logits_CV.gather(1, targets.ids_NK).masked_fill(absent_CK, -torch.inf)
    next_C = logits_CV.gather(1, targets.next_N[:, None])[:, 0]
    max_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()
    top_CK = exp_CV.gather(1, targets.ids_NK)
    exp_CV.scatter_(1, targets.ids_NK, 0.0)
    rest_C = exp_CV.sum(-1)
    exp_CV.scatter_(1, targets.ids_NK, top_CK)
    lse_C = max_C1[:, 0] + (rest_C + top_CK.masked_fill(absent_CK, 0.0).sum(-1)).log()
    lse_rest_C = max_C1[:, 0] + rest_C.log()
    student = StudentSoftmax(logits_CK, next_C, lse_C, lse_rest_C, exp_CV.shape[1], whole_CV)
    return student, exp_CV, max_C1[:, 0]


def _gradient(
    exp_CV: torch.Tensor, student: StudentSoftmax, max_C: torch.Tensor, kd: LossTerms, targets: Targets, mix: Mix
) -> torch.Tensor:
    """The mix's gradient in the logits `[C, V]`, in the memory of the exponentials."""
    scale_C = (max_C - student.lse_N).exp()
    q_CS = exp_CV.gather(1, kd.ids_NS) * scale_C[:, None]
    outside_C = mix.kd_weight * kd.outside_N + mix.ce_weight
    grad_CV = exp_CV.mul_((outside_C * scale_C)[:, None])
    grad_CV.scatter_(1, kd.ids_NS, mix.kd_weight * kd.inside_NS + mix.ce_weight * q_CS)
    if kd.dense_NV is not None:
        grad_CV.add_(kd.dense_NV, alpha=mix.kd_weight)
    if mix.ce_weight:
        minus_C1 = torch.full_like(max_C, -mix.ce_weight)[:, None]
        grad_CV.scatter_add_(1, targets.next_N[:, None], minus_C1)
    return grad_CV


class _Buffers:
    """Arrays of a chunk that the next one uses again: the system zeroes every page of a fresh one."""

    def __init__(self, chunk: int, weight_VD: torch.Tensor) -> None:
        self.product_CV = weight_VD.new_empty(chunk, len(weight_VD))  # logits, later their gradient
        single = weight_VD.dtype == torch.float32
        self.wide_CV = self.product_CV if single else torch.empty_like(self.product_CV, dtype=torch.float32)
        self.head_VD = torch.empty_like(weight_VD)

    def logits(self, hidden_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """The logits of a chunk `[C, V]` in float32."""
        product_CV = torch.mm(hidden_CD, weight_VD.T, out=self.product_CV[: len(hidden_CD)])
        return product_CV if self.wide_CV is self.product_CV else self.wide_CV[: len(hidden_CD)].copy_(product_CV)

    def narrow(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """Their gradient in the precision of the products."""
        return grad_CV if self.wide_CV is self.product_CV else self.product_CV[: len(grad_CV)].copy_(grad_CV)


class _FusedHead(torch.autograd.Function):  # type: ignore[misc]
    """Forward computes the loss and its gradients in hidden states and head; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        targets: Targets,
        mix: Mix,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        compute = hidden_ND.dtype
        weight_VD = head_VD.detach().to(compute)
        want_hidden, want_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if want_head else None
        buffers = _Buffers(min(chunk, len(hidden_ND)), weight_VD)
        sums_3 = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD = hidden_ND[rows]
            part = targets.rows(rows)
            logits_CV = buffers.logits(hidden_CD, weight_VD)
            student, exp_CV, max_C = _softmax(logits_CV, part)
            kd = mix.kd(student, part, mix.options)
            ce = cross_entropy.terms(part.next_N, student.logit_next_N, student.lse_N)
            kd_sum, ce_sum = kd.loss_N.sum(), ce.loss_N.sum()
            sums_3 += torch.stack([mix.kd_weight * kd_sum + mix.ce_weight * ce_sum, kd_sum, ce_sum])
            if not (want_hidden or want_head):
                continue
            grad_CV = buffers.narrow(_gradient(exp_CV, student, max_C, kd, part, mix))
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[rows])
            if grad_head_VD is not None:
                grad_head_VD += torch.mm(grad_CV.T, hidden_CD, out=buffers.head_VD)
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        return sums_3[0], sums_3[1], sums_3[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        scale = grads[0]
        hidden = None if grad_hidden_ND is None else grad_hidden_ND * scale.to(grad_hidden_ND.dtype)
        head = None if grad_head_VD is None else (grad_head_VD * scale).to(ctx.head_dtype)
        return hidden, head, None, None, None


def fused_head_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets, mix: Mix, chunk: int = 256
) -> Sums:
    """Sum over N positions of the mixed loss of `softmax(hidden @ head.T)`, float32 inside.

    `hidden_ND` sets the precision of the matrix products; the head may be kept in float32 beside it.
    The two parts in the result carry no gradient.
    """
    total, kd, ce = _FusedHead.apply(hidden_ND, head_VD, targets, mix, chunk)
    return Sums(total, kd.detach(), ce.detach())
