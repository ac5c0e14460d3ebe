"""KL over the whole vocabulary with a live teacher: the reference that losses on a cache are measured against.

    L = [τ²]·KL( softmax(t/τ) ‖ softmax(z/τ) ),     gradient [τ²]·(q̃ − p̃)/τ

with t the teacher's logits (Hinton et al., arXiv 1503.02531, section 2). The teacher gives its last hidden states, and
its head is applied to a chunk at a time, so that B·T·V is held for neither of the two. A chunk takes four arrays of
[C, V] in float32 where the others take one. Ids that the student has and the teacher has not, the padding of a head,
have p = 0.

Axes: N positions in a chunk, V vocabulary, S scattered entries (none).
"""

from __future__ import annotations

import torch

from lmdistill.errors import LmdistillError
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


def _log_softmax_(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """log-softmax at a temperature, in the logits' memory."""
    logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).div_(temperature)
    return logits_NV.sub_(logits_NV.logsumexp(-1, keepdim=True))


@loss("full_kl", signals="live", options=("temperature", "hinton_scaled"))
def full_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(teacher ‖ student) over the whole vocabulary, the recipe's teacher run beside the student."""
    if targets.live is None or student.logits_NV is None:
        raise LmdistillError("the loss full_kl needs a live teacher", fix="add `teacher:` to the recipe")
    log_q_NV = _log_softmax_(student.logits_NV, options.temperature)
    log_p_NV = _log_softmax_(targets.live.logits(), options.temperature)
    real, scale = slice(log_p_NV.shape[1]), options.kl_scale
    p_NV = log_p_NV.exp()
    apart_N = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV[:, real]))
    grad_NV = log_q_NV.exp_()
    grad_NV[:, real] -= p_NV
    loss_N = scale * (apart_N + grad_NV.sum(-1))  # q − p sums to zero but for rounding, and that cancels
    grad_NV.mul_(scale / options.temperature)
    return LossTerms(loss_N, torch.zeros_like(loss_N), targets.ids_NK[:, :0], grad_NV[:, :0], grad_NV)
