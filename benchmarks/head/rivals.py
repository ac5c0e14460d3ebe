"""Others' chunked distillation losses: over the whole vocabulary, from a live teacher's last hidden states.

A rival that cannot run here is a reason in words in the place of a way.

Axes: N tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from head.case import Case, Way
from head.ways import CE_WEIGHT, KD_WEIGHT

BETA = 0.5  # both rivals' own default


def _liger() -> Way:
    """Liger's fused linear JSD in plain torch, gradients in the forward pass; with the same share of cross-entropy."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(CE_WEIGHT, KD_WEIGHT, beta=BETA, compiled=False)

    def way(case: Case) -> torch.Tensor:
        weight_VD = case.head_VD.to(case.hidden_ND.dtype)
        result: Any = loss(case.hidden_ND, weight_VD, case.live.hidden_ND, case.live.head_VD, case.targets.next_N)
        return result

    return way


def _trl() -> Way:
    """What TRL's DistillationTrainer computes; no cross-entropy in it, products in float32 where there is no GPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def way(case: Case) -> torch.Tensor:
        teacher = case.live
        loss_N, _ = ChunkedDivergenceFunction.apply(
            case.hidden_ND, case.head_VD, None, teacher.hidden_ND, teacher.head_VD, None, BETA
        )
        return loss_N.mean()

    return way


RIVALS = {"liger_chunked_jsd": _liger, "trl_chunked_jsd": _trl}


def rival(name: str) -> Way | str:
    """A rival as a way, or why it cannot run here."""
    try:
        return RIVALS[name]()
    except ImportError as problem:
        return f"cannot be imported: {problem}"
