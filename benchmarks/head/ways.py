"""Ways to cross-entropy and to distillation from a head: the product's own, torch's, and both from their definition.

Axes: N tokens, C tokens of a chunk, D hidden width, V vocabulary, K cached entries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import LinearCrossEntropyOptions, functional

from head.case import Case, Way
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions

KD_WEIGHT, CE_WEIGHT = 0.9, 0.1  # as recipes train


def fused(name: str, chunk: int) -> Way:
    """The product's loss called `name`: the fused head with the KD mix, or with cross-entropy alone."""
    mix = Mix(registry.get(name), LossOptions(), *((0.0, 1.0) if name == "ce" else (KD_WEIGHT, CE_WEIGHT)))
    signals = registry.signals_of(name)

    def way(case: Case) -> torch.Tensor:
        targets = case.targets
        if signals == "live":
            targets = replace(targets, live=case.live)
        elif signals == "sampled":
            targets = replace(targets, weight_NK=targets.logp_NK.exp())
        return fused_head_loss(case.hidden_ND, case.head_VD, targets, mix, chunk).total / len(case.hidden_ND)

    return way


class _CeByChunk(torch.autograd.Function):  # type: ignore[misc]
    """Chunks of torch's cross-entropy, each with its own backward pass as soon as it is computed."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, next_N: torch.Tensor, chunk: int) -> Any:
        weight_VD = head_VD.detach().to(hidden_ND.dtype)
        grad_hidden_ND, grad_head_VD = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        total = torch.zeros(())
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                logits_CV = (hidden_ND[rows] @ weight_VD.T).detach().requires_grad_()
                loss = functional.cross_entropy(logits_CV.float(), next_N[rows], reduction="sum")
                (grad_CV,) = torch.autograd.grad(loss, logits_CV)
            total += loss.detach()
            grad_hidden_ND[rows] = grad_CV @ weight_VD
            grad_head_VD += grad_CV.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        return total / hidden_ND.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden_ND, head_VD = ctx.saved_tensors
        scale = grads[0] / hidden_ND.shape[0]
        return hidden_ND * scale.to(hidden_ND.dtype), head_VD * scale, None, None


def ce_by_chunk(chunk: int) -> Way:
    """Gradients in the forward pass, torch's cross-entropy inside."""
    return lambda case: _CeByChunk.apply(case.hidden_ND, case.head_VD, case.targets.next_N, chunk)


def ce_torch_linear(chunk: int) -> Way:
    """torch's own fusion of head and cross-entropy, by chunks of the same size."""
    options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)

    def way(case: Case) -> torch.Tensor:
        weight_VD = case.head_VD.to(case.hidden_ND.dtype)
        return functional.linear_cross_entropy(case.hidden_ND, weight_VD, case.targets.next_N, options=options)

    return way


def ce_whole(case: Case) -> torch.Tensor:
    """torch's cross-entropy on all logits at once."""
    logits_NV = (case.hidden_ND @ case.head_VD.to(case.hidden_ND.dtype).T).float()
    return functional.cross_entropy(logits_NV, case.targets.next_N)


def kd_whole(case: Case) -> torch.Tensor:
    """The same mix as the product's from its definition, on all logits at once, with autograd."""
    targets, hidden_ND = case.targets, case.hidden_ND
    logits_NV = hidden_ND @ case.head_VD.to(hidden_ND.dtype).T
    logq_NV = (logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()).log_softmax(-1)
    logq_NK = logq_NV.gather(1, targets.ids_NK)
    rest_N = logq_NV.scatter(1, targets.ids_NK, -torch.inf).logsumexp(-1)
    inside_N = (targets.logp_NK.exp() * (targets.logp_NK - logq_NK)).sum(-1)
    kd_N = inside_N + targets.tail_N.exp() * (targets.tail_N - rest_N)
    ce_N = -logq_NV.gather(1, targets.next_N[:, None])[:, 0]
    return (KD_WEIGHT * kd_N + CE_WEIGHT * ce_N).mean()


def plain_ce(chunk: int) -> dict[str, Way]:
    """The ways to cross-entropy alone: the fastest is what KD is measured against."""
    return {
        "ce_fused": fused("ce", chunk),
        "ce_by_chunk": ce_by_chunk(chunk),
        "ce_torch_linear": ce_torch_linear(chunk),
        "ce_whole": ce_whole,
    }
