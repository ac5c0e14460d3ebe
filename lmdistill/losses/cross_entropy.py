"""Next-token cross-entropy: the ground-truth part of every mix, and the baseline at equal tokens.

Axes: N positions, S scattered entries a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets, loss

if TYPE_CHECKING:
    import torch


def terms(next_N: torch.Tensor, logit_next_N: torch.Tensor, lse_N: torch.Tensor) -> LossTerms:
    """-log q(next), gradient `softmax(z) - onehot(next)`."""
    one_N = lse_N.new_ones(lse_N.shape)
    q_next_N = (logit_next_N - lse_N).exp()
    return LossTerms(lse_N - logit_next_N, one_N, next_N[:, None], (q_next_N - 1.0)[:, None])


@loss("ce")
def cross_entropy(student: StudentSoftmax, targets: Targets, options: LossOptions) -> LossTerms:
    """Cross-entropy with the text itself; the teacher is not looked at."""
    return terms(targets.next_N, student.logit_next_N, student.lse_N)
