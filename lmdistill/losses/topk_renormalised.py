"""Plain top-K distillation: teacher and student renormalised over the teacher's K ids, at a temperature.

    L = [τ²]·KL( softmax(log p_S/τ) ‖ softmax(z_S/τ) ),     gradient in z_S: [τ²]·(q̃ − p̃)/τ, zero elsewhere

What it ignores: how much mass teacher and student have on S, and every logit outside S, which gets no gradient at
all. A student may be at its zero with almost all of its mass elsewhere. `decoupled_topk` adds the term that is missing.

Axes: N positions, K cached entries.
"""

from __future__ import annotations

from lmdistill.losses.cells import renormalised, tempered_kl
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


@loss("topk_renormalised", signals="top_k", options=("temperature", "hinton_scaled"))
def topk_renormalised(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL inside the teacher's top K alone (the truncated baseline of LFM2 and of Sparse Logit Sampling)."""
    return tempered_kl(renormalised(student, targets, options.temperature), options, student, targets)
