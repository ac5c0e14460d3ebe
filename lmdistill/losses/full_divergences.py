"""Divergences over the whole vocabulary with a live teacher: what a student's own tokens are scored with.

The formulas are those of `divergences.py`, with a cell for every id, so that nothing is coarsened: the reverse KL of
MiniLLM (arXiv 2306.08543, section 2.1) and of on-policy distillation, GKD's generalised JS, DistiLLM's skew KLs. An id
that the student has and the teacher has not, the padding of a head, gets the smallest mass there is: the student
unlearns it. A chunk takes about ten arrays of [C, V] in float32.

Axes: N positions in a chunk, V vocabulary, C cells: one for every id of the student.
"""

from __future__ import annotations

import torch

from lmdistill.errors import LmdistillError
from lmdistill.losses.cells import Cells
from lmdistill.losses.divergences import mixed, reverse, skewed, skewed_reverse
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


def _cells(student: StudentSoftmax, targets: Targets) -> Cells:
    """Both distributions over all ids of the student; LmdistillError where no teacher is live."""
    if targets.live is None or student.logits_NV is None:
        raise LmdistillError(
            "a loss over the whole vocabulary needs a live teacher", fix="add `teacher:` to the recipe"
        )
    log_q_NV = student.logits_NV.sub_(student.lse_N[:, None])
    log_p_NV = targets.live.logits().log_softmax(-1)
    least = torch.tensor(torch.finfo(log_p_NV.dtype).tiny).log().item()
    padding = log_q_NV.shape[1] - log_p_NV.shape[1]
    log_p_NV = torch.nn.functional.pad(log_p_NV.clamp_min_(least), (0, padding), value=least)
    return Cells(log_p_NV, log_q_NV, log_p_NV - log_q_NV)


def _dense(cells: Cells, loss_NC: torch.Tensor, slope_NC: torch.Tensor, targets: Targets) -> LossTerms:
    """Terms whose gradient is given whole."""
    loss_N, none_N0 = loss_NC.sum(-1), targets.ids_NK[:, :0]
    return LossTerms(loss_N, torch.zeros_like(loss_N), none_N0, loss_NC[:, :0], cells.gradient(slope_NC))


@loss("full_reverse_kl", signals="live")
def full_reverse_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(student ‖ teacher) over the whole vocabulary, the recipe's teacher run beside the student (MiniLLM)."""
    cells = _cells(student, targets)
    return _dense(cells, *reverse(cells), targets)


@loss("full_js", signals="live", options=("js_beta",))
def full_js(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """Generalised Jensen-Shannon divergence over the whole vocabulary, the teacher run beside the student (GKD)."""
    cells = _cells(student, targets)
    return _dense(cells, *mixed(cells, options.js_beta), targets)


@loss("full_skew_kl", signals="live", options=("skew_alpha",))
def full_skew_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(teacher ‖ α·teacher + (1−α)·student) over the whole vocabulary, the teacher run beside the student."""
    cells = _cells(student, targets)
    return _dense(cells, *skewed(cells, options.skew_alpha), targets)


@loss("full_skew_reverse_kl", signals="live", options=("skew_alpha",))
def full_skew_reverse_kl(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """KL(student ‖ (1−α)·teacher + α·student) over the whole vocabulary, the teacher run beside the student."""
    cells = _cells(student, targets)
    return _dense(cells, *skewed_reverse(cells, options.skew_alpha), targets)
