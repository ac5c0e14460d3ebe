"""Sampled distillation: an unbiased estimate of the full KL from ids drawn from the teacher (arXiv 2503.16870).

The cache holds n draws from a proposal r ∝ p^t at a position: ids i, how often each came, and the weight

    w_i = (c_i/n) · (p_i/r_i),      E[w_i] = p_i for every id of the vocabulary, drawn or not.

Hence with W = Σ w_i over the drawn ids (W = 1 at t = 1, E[W] = 1 else)

    L = Σ w_i·(log p_i − log q_i),     gradient  W·q_v − [v drawn]·w_v,

whose means over draws are KL(p‖q) and q − p, its gradient. A top-K cache has no such weights: renormalised, its
gradient is q − p·[v ∈ S]/P, which pulls the student to the teacher's head whatever is drawn or averaged.
`self_normalised` divides the weights by W: less variance at t ≠ 1, for a bias of order 1/n. Temperatures have no
place here: tempered targets need the teacher's whole distribution.

Axes: N positions, K drawn ids (distinct; those that are missing have log-prob −inf).
"""

from __future__ import annotations

from lmdistill.errors import LmdistillError
from lmdistill.losses.registry import (
    LossOptions,
    LossTerms,
    StudentSoftmax,
    Targets,
    absent_as_first,
    loss,
)


@loss("sampled_kd", signals="sampled", options=("self_normalised",))
def sampled_kd(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """Importance-weighted cross-entropy to the drawn ids, less the teacher's own (Sparse Logit Sampling, section 3)."""
    if targets.weight_NK is None:
        raise LmdistillError(
            "the loss sampled_kd needs drawn ids with their weights",
            why="this teacher cache holds the teacher's top K",
            fix="set `variant: sampled` in the teach stage, or `loss: decoupled_topk` in distill",
        )
    weight_NK = targets.weight_NK
    total_N1 = weight_NK.sum(-1, keepdim=True)
    if options.self_normalised:
        weight_NK, total_N1 = weight_NK / total_N1, total_N1.new_ones(total_N1.shape)
    log_q_NK = student.logits_NK - student.lse_N[:, None]
    apart_NK = (targets.logp_NK - log_q_NK).masked_fill(targets.absent_NK, 0.0)  # −inf − −inf counts nothing
    inside_NK = total_N1 * log_q_NK.exp() - weight_NK
    return LossTerms(
        (weight_NK * apart_NK).sum(-1), total_N1[:, 0], targets.ids_NK, absent_as_first(inside_NK, targets)
    )
