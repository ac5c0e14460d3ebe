"""The head fused with a loss: logits by chunks, gradients in the forward pass, never B·T·V.

A chunk's logits are one matrix product; loss and gradient then go through it by blocks of positions that stay in the
processor's cache from one pass to the next.

Axes: N positions (all), C positions of one chunk, B of one block, D hidden width, V vocabulary, K cached entries,
S scattered, H rows of the head at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lmdistill.losses.registry import LossFunction, LossOptions, LossTerms, StudentSoftmax, Targets

LOG2_E = math.log2(math.e)
CACHED_LOGITS = 3 << 20  # of a block: 12 MiB of float32
HEAD_ROWS = 2048  # of the head's gradient at once, on a CPU


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


def _softmax(logits_BV: torch.Tensor, targets: Targets) -> tuple[StudentSoftmax, torch.Tensor, torch.Tensor]:
    """The student's softmax of a block, `exp(z − max)` `[B, V]` in the logits' memory, and the maxima `[B]`.

    The mass outside the teacher's top K is summed by itself with those K set to zero: it is exact where it
    is small, which `1 − Q` would not be. Absent entries repeat an id and count as nothing.
    """
    absent_BK = targets.absent_NK
    whole_BV = None if targets.live is None else logits_BV.clone()
    logits_BK = logits_BV.gather(1, targets.ids_NK).masked_fill(absent_BK, -torch.inf)
    next_B = logits_BV.gather(1, targets.next_N[:, None])[:, 0]
    max_B1 = logits_BV.amax(-1, keepdim=True)
    exp_BV = logits_BV.sub_(max_B1).mul_(LOG2_E).exp2_()  # a third of exp's time on a CPU, and as exact
    top_BK = exp_BV.gather(1, targets.ids_NK)
    exp_BV.scatter_(1, targets.ids_NK, 0.0)
    rest_B = exp_BV.sum(-1)
    exp_BV.scatter_(1, targets.ids_NK, top_BK)
    lse_B = max_B1[:, 0] + (rest_B + top_BK.masked_fill(absent_BK, 0.0).sum(-1)).log()
    lse_rest_B = max_B1[:, 0] + rest_B.log()
    student = StudentSoftmax(logits_BK, next_B, lse_B, lse_rest_B, exp_BV.shape[1], whole_BV)
    return student, exp_BV, max_B1[:, 0]


def _gradient(
    exp_BV: torch.Tensor, student: StudentSoftmax, max_B: torch.Tensor, kd: LossTerms, targets: Targets, mix: Mix
) -> torch.Tensor:
    """The mix's gradient in the logits `[B, V]`, in the memory of the exponentials."""
    scale_B = (max_B - student.lse_N).exp()
    q_BS = exp_BV.gather(1, kd.ids_NS) * scale_B[:, None]
    ce_B1 = mix.ce_weight if targets.scale_2N is None else mix.ce_weight * targets.scale_2N[1][:, None]
    outside_B1 = mix.kd_weight * kd.outside_N[:, None] + ce_B1
    grad_BV = exp_BV.mul_(outside_B1 * scale_B[:, None])
    grad_BV.scatter_(1, kd.ids_NS, mix.kd_weight * kd.inside_NS + ce_B1 * q_BS)
    if kd.dense_NV is not None:
        grad_BV.add_(kd.dense_NV, alpha=mix.kd_weight)
    if mix.ce_weight:
        grad_BV.scatter_add_(1, targets.next_N[:, None], torch.full_like(max_B, -1.0)[:, None] * ce_B1)
    return grad_BV


def _scaled(kd: LossTerms, scale_2B: torch.Tensor) -> LossTerms:
    """Terms of a loss whose positions weigh as much as the first of two rows says."""
    scale_B, scale_B1 = scale_2B[0], scale_2B[0][:, None]
    dense_BV = None if kd.dense_NV is None else kd.dense_NV.mul_(scale_B1)
    return LossTerms(kd.loss_N * scale_B, kd.outside_N * scale_B, kd.ids_NS, kd.inside_NS * scale_B1, dense_BV)


class _Arrays:
    """What a chunk is worked out in, used again by the next one: the system zeroes every page of a fresh array."""

    def __init__(self, chunk: int, weight_VD: torch.Tensor) -> None:
        vocab, on_cpu = len(weight_VD), weight_VD.device.type == "cpu"
        self.weight_VD = weight_VD
        self.product_CV = weight_VD.new_empty(chunk, vocab)  # logits, later their gradient
        self.block = max(1, min(chunk, CACHED_LOGITS // vocab)) if on_cpu else chunk
        self.head_rows = HEAD_ROWS if on_cpu else vocab
        self.single = weight_VD.dtype == torch.float32
        if not self.single:
            self.wide_BV = torch.empty_like(self.product_CV[: self.block], dtype=torch.float32)
            self.part_HD = weight_VD[: self.head_rows].clone()

    def terms(self, product_BV: torch.Tensor, targets: Targets, mix: Mix, sums_2B: torch.Tensor, grad: bool) -> None:
        """Losses of a block, KD and CE, into `sums_2B`; the mix's gradient in the logits where these were."""
        logits_BV = product_BV if self.single else self.wide_BV[: len(product_BV)].copy_(product_BV)
        student, exp_BV, max_B = _softmax(logits_BV, targets)
        kd = mix.kd(student, targets, mix.options)
        sums_2B[0], sums_2B[1] = kd.loss_N, student.lse_N - student.logit_next_N
        if targets.scale_2N is not None:
            kd = _scaled(kd, targets.scale_2N)
            sums_2B.mul_(targets.scale_2N)
        if grad:
            grad_BV = _gradient(exp_BV, student, max_B, kd, targets, mix)
            if not self.single:
                product_BV.copy_(grad_BV)

    def add_head(self, grad_head_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, first: bool) -> None:
        """Add a chunk's gradient in the head to the sum, in float32."""
        if self.single:
            torch.addmm(grad_head_VD, grad_CV.T, hidden_CD, beta=0.0 if first else 1.0, out=grad_head_VD)
            return
        for start in range(0, len(grad_head_VD), self.head_rows):
            rows = slice(start, start + self.head_rows)
            sum_HD = grad_head_VD[rows]
            part_HD = torch.mm(grad_CV[:, rows].T, hidden_CD, out=self.part_HD[: len(sum_HD)])
            sum_HD.copy_(part_HD) if first else sum_HD.add_(part_HD)


class _FusedHead(torch.autograd.Function):  # type: ignore[misc]
    """Forward computes the loss and its gradients in hidden states and head; backward scales them where they are.

    Not in `save_for_backward`: a tensor held there besides is copied when it becomes the parameter's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        targets: Targets,
        mix: Mix,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(hidden_ND)
        want_hidden, want_head = ctx.needs_input_grad[:2]
        weight_VD = head_VD.detach().to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if want_hidden else None
        fresh = torch.empty_like if count else torch.zeros_like
        grad_head_VD = fresh(head_VD, dtype=torch.float32) if want_head else None
        arrays = _Arrays(min(chunk, count), weight_VD)
        losses_2N = hidden_ND.new_empty(2, count, dtype=torch.float32)
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            hidden_CD = hidden_ND[rows]
            product_CV = torch.mm(hidden_CD, weight_VD.T, out=arrays.product_CV[: len(hidden_CD)])
            for begin in range(rows.start, rows.stop, arrays.block):
                block = slice(begin, min(begin + arrays.block, rows.stop))
                product_BV = product_CV[begin - start : block.stop - start]
                arrays.terms(product_BV, targets.rows(block), mix, losses_2N[:, block], want_hidden or want_head)
            if grad_hidden_ND is not None:
                torch.mm(product_CV, weight_VD, out=grad_hidden_ND[rows])
            if grad_head_VD is not None:
                arrays.add_head(grad_head_VD, product_CV, hidden_CD, first=start == 0)
        kd, ce = losses_2N.sum(-1)
        ctx.gradients = grad_hidden_ND, grad_head_VD
        ctx.head_dtype = head_VD.dtype
        return mix.kd_weight * kd + mix.ce_weight * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients went with its first backward pass; run the forward again")
        (grad_hidden_ND, grad_head_VD), ctx.gradients = ctx.gradients, None
        scale = grads[0]
        hidden = None if grad_hidden_ND is None else grad_hidden_ND.mul_(scale)
        head = None if grad_head_VD is None else grad_head_VD.mul_(scale).to(ctx.head_dtype)
        return hidden, head, None, None, None


def fused_head_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets, mix: Mix, chunk: int = 256
) -> Sums:
    """Sum over N positions, each with its weights, of the mixed loss of `softmax(hidden @ head.T)`, float32 inside.

    `hidden_ND` sets the precision of the matrix products; the head may be kept in float32 beside it.
    The two parts in the result carry no gradient.
    """
    total, kd, ce = _FusedHead.apply(hidden_ND, head_VD, targets, mix, chunk)
    return Sums(total, kd.detach(), ce.detach())
