"""Relations of queries, keys or values among themselves: X·Xᵀ/√d_r, raw or through a softmax, causal.

Both sides are split anew into as many relation heads. Gradients are made in the forward pass, some queries at a time,
so that T·T never stands in memory.

Axes: R rows, H relation heads, T positions, E width of a relation head, q queries of a chunk, k keys up to their last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.registry import Positions, Sides, intermediate

CHUNK = 256  # queries whose relations are held at once
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def raw(student_RHqk: torch.Tensor, teacher_RHqk: torch.Tensor, allowed_Rqk: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Squared error of raw scores, a mean over heads and keys `[R, q]`, and its gradient in the student's."""
    keys_Rq = allowed_Rqk.sum(-1).to(student_RHqk.dtype)
    heads = student_RHqk.shape[1]
    error_RHqk = (student_RHqk - teacher_RHqk).masked_fill(~allowed_Rqk[:, None], 0.0)
    loss_Rq = error_RHqk.pow(2).sum((1, 3)) / (heads * keys_Rq)
    return loss_Rq, error_RHqk * (2 / (heads * keys_Rq))[:, None, :, None]


def softmaxed(
    student_RHqk: torch.Tensor, teacher_RHqk: torch.Tensor, allowed_Rqk: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """KL(teacher ‖ student) of the scores' softmax over keys, a mean over heads `[R, q]`, and its gradient."""
    barred_Rhqk = ~allowed_Rqk[:, None]
    log_q_RHqk = student_RHqk.masked_fill(barred_Rhqk, -torch.inf).log_softmax(-1)
    log_p_RHqk = teacher_RHqk.masked_fill(barred_Rhqk, -torch.inf).log_softmax(-1)
    p_RHqk = log_p_RHqk.exp()
    gap_RHqk = (log_p_RHqk - log_q_RHqk).masked_fill(barred_Rhqk, 0.0)
    loss_Rq = (p_RHqk * gap_RHqk).sum((1, 3)) / student_RHqk.shape[1]
    return loss_Rq, (log_q_RHqk.exp() - p_RHqk) / student_RHqk.shape[1]


def allowed_keys(positions: Positions, queries: slice) -> torch.Tensor:
    """Which keys each query sees `[R, q, k]`: those up to itself, in its own document."""
    length = positions.counts_RT.shape[1]
    place_T = torch.arange(length, device=positions.counts_RT.device)
    allowed_Rqk = (place_T[queries, None] >= place_T[None, : queries.stop])[None]
    if positions.document_RT is None:
        return allowed_Rqk.expand(len(positions.counts_RT), -1, -1)
    document_RT = positions.document_RT
    return allowed_Rqk & (document_RT[:, queries, None] == document_RT[:, None, : queries.stop])


class _Relations(torch.autograd.Function):  # type: ignore[misc]
    """Forward computes the loss and its gradient in the student's heads; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, student_RHTE: torch.Tensor, teacher_RHTE: torch.Tensor, positions: Positions, form: Form
    ) -> torch.Tensor:
        total = student_RHTE.new_zeros(())
        grad_RHTE = torch.zeros_like(student_RHTE)
        scales = [1 / math.sqrt(side.shape[-1]) for side in (student_RHTE, teacher_RHTE)]
        length = student_RHTE.shape[2]
        for start in range(0, length, CHUNK):
            queries = slice(start, min(start + CHUNK, length))
            keys = slice(0, queries.stop)
            scores = [
                side[:, :, queries] @ side[:, :, keys].mT * scale
                for side, scale in zip((student_RHTE, teacher_RHTE), scales, strict=True)
            ]
            loss_Rq, grad_RHqk = form(scores[0], scores[1], allowed_keys(positions, queries))
            counts_Rq = positions.counts_RT[:, queries]
            total += loss_Rq.where(counts_Rq, 0.0).sum()
            grad_RHqk = grad_RHqk * counts_Rq[:, None, :, None].to(grad_RHqk.dtype) * scales[0]
            grad_RHTE[:, :, queries] += grad_RHqk @ student_RHTE[:, :, keys]
            grad_RHTE[:, :, keys] += grad_RHqk.mT @ student_RHTE[:, :, queries]
        ctx.save_for_backward(grad_RHTE)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_RHTE,) = ctx.saved_tensors
        return grad_RHTE * grads[0], None, None, None


class _Relation(torch.nn.Module):  # type: ignore[misc]
    """Relations in one form."""

    form: Callable[..., Any]  # a `Form`, as a static method

    def __init__(self, sides: Sides, keys: IntermediateKeys) -> None:
        super().__init__()
        self.heads = keys.relation_heads or sides.heads

    def forward(self, student_RTD: torch.Tensor, teacher_RTD: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The sum over the queries that count."""
        sides = [
            side.unflatten(2, (self.heads, -1)).transpose(1, 2).contiguous() for side in (student_RTD, teacher_RTD)
        ]
        total: torch.Tensor = _Relations.apply(*sides, positions, type(self).form)
        return total


@intermediate("relation_mse", reads="relations", options=("relations", "relation_heads"))
class RelationMse(_Relation):
    """Squared error of the raw scores X·Xᵀ/√d of queries, keys and values among themselves; runs the teacher."""

    form = staticmethod(raw)


@intermediate("relation_kl", reads="relations", options=("relations", "relation_heads"))
class RelationKl(_Relation):
    """KL of those scores' softmax over the keys that a query sees; runs the teacher."""

    form = staticmethod(softmaxed)
