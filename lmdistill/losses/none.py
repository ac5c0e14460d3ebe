"""No loss at the head, for distillations by intermediate losses alone: the head is then not even computed."""

from __future__ import annotations

import torch

from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss


@loss("none")
def none(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """No loss at the head: the entries of `intermediate` teach alone."""
    zero_N = torch.zeros_like(student.lse_N)
    return LossTerms(zero_N, zero_N, targets.ids_NK[:, :0], student.logits_NK[:, :0])
