"""Top-K distillation with one bucket for the rest: forward KL of K+1 cells, all of them at a temperature.

With P_i, Q_i the masses of the K ids and of the rest:

    L = [τ²]·KL( softmax(log P/τ) ‖ softmax(log Q/τ) ),     gradient in the cells' logits: [τ²]·(Q̃ − P̃)/τ

At τ = 1 the chain rule makes it `decoupled_topk` with the factor P, and `forward_kl`. At other temperatures the rest,
one cell for many ids, is tempered as if it were one id, and the mass of the top K moves with τ: that is what
`decoupled_topk` avoids by tempering inside S alone.

Axes: N positions, K cached entries.
"""

from __future__ import annotations

from lmdistill.losses.cells import tempered_kl, with_rest
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


@loss("topk_rest_bucket", signals="top_k", options=("temperature", "hinton_scaled"))
def topk_rest_bucket(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL of the K ids and one bucket for the rest, tempered together."""
    return tempered_kl(with_rest(student, targets, options.temperature), options, student, targets)
