"""BD-KD's balance of forward and reverse KL, token by token, on K+1 cells (arXiv 2212.12965).

The forward KL makes a student spread, the reverse KL makes it concentrate. Where the student is the sharper of the
two (its entropy H is the smaller), the forward KL gets the larger weight w; else the reverse KL gets it:

    L = w_f·KL(p‖q) + (1−w_f)·KL(q‖p),     w_f = w where H(q) < H(p), else 1−w

H is that of the cells with the rest spread evenly over its ids. (Counted as one id, a rest that holds all of a flat
student would look sharp.) The paper balances per image by the two entropies; that w is a constant that the recipe sets,
and that the pair sums to one, is our choice. The weight is a step of q, so it carries no gradient; w = ½ is the mean.

Axes: N positions, C cells.
"""

from __future__ import annotations

from lmdistill.losses.cells import divergence, entropy, with_rest
from lmdistill.losses.divergences import forward, reverse
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


@loss("bd_kd", signals="top_k", options=("bd_weight",))
def bd_kd(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """Forward and reverse KL, the one weighing more that corrects the student's sharpness (BD-KD)."""
    cells, weight = with_rest(student, targets), options.bd_weight
    rest_ids_N = (student.vocab_size - (~targets.absent_NK).sum(-1)).clamp_min(1).to(cells.p_NC.dtype)
    sharper_N = entropy(cells.log_q_NC, rest_ids_N) < entropy(cells.log_p_NC, rest_ids_N)
    sharper_N1 = sharper_N[:, None].to(cells.p_NC.dtype)
    forward_N1 = sharper_N1 * weight + (1.0 - sharper_N1) * (1.0 - weight)
    parts = zip(forward(cells), reverse(cells), strict=True)
    loss_NC, slope_NC = (forward_N1 * ahead + (1.0 - forward_N1) * back for ahead, back in parts)
    return divergence(cells, loss_NC, slope_NC, student, targets)
