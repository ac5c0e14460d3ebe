"""Losses and divergences of full-vocabulary log-probabilities, exact enough to resolve a mean KL of 1e-9.

Axes: N predictions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHUNK = 16  # predictions at a time: 16 × 49,152 float64 is 6 MiB, so temporaries stay near the processor


def log_softmax_in_place(logits_NV: torch.Tensor) -> torch.Tensor:
    """Turn float32 logits [N, V] into natural log-probabilities, by chunks, in the same memory."""
    import torch

    for start in range(0, len(logits_NV), CHUNK):
        chunk_CV = logits_NV[start : start + CHUNK]
        chunk_CV.copy_(torch.log_softmax(chunk_CV, dim=-1))
    return logits_NV


def nll(log_x_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """−log x(target) [N], nats, float64."""
    return -log_x_NV.gather(-1, targets_N[:, None]).squeeze(-1).double()


def kl(log_p_NV: torch.Tensor, log_x_NV: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ x) of each prediction [N], nats, float64, from float32 log-probabilities.

    Computed as Σ x − p − p·(log x − log p), which is KL since Σp = Σx = 1. Every term is ≥ 0 and rounding of the
    float32 log-probabilities enters squared (1e-6 becomes 1e-12), where Σ p·(log p − log x) would carry it whole.
    """
    import torch

    sums = []
    for start in range(0, len(log_p_NV), CHUNK):
        p_CV = log_p_NV[start : start + CHUNK].double()
        x_CV = log_x_NV[start : start + CHUNK].double()
        d_CV = x_CV - p_CV
        p_CV.exp_()
        x_CV.exp_()
        weighted_CV = p_CV * d_CV.masked_fill_(p_CV == 0, 0.0)  # what p rules out costs nothing, even where x does too
        sums.append((x_CV - p_CV - weighted_CV).sum(-1))
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)


def agrees(log_p_NV: torch.Tensor, log_x_NV: torch.Tensor) -> torch.Tensor:
    """1.0 where both give the same token the highest probability [N], float64."""
    return (log_p_NV.argmax(-1) == log_x_NV.argmax(-1)).double()


def ratio_and_error(sums_R: Any, counts_R: Any) -> tuple[float, float | None]:
    """Σ sums / Σ counts and its standard error, rows being the independent units (predictions of a row are not).

    The error is that of a ratio estimator over R clusters; None where there is but one row.
    """
    import numpy as np

    sums_R, counts_R = np.asarray(sums_R, dtype=np.float64), np.asarray(counts_R, dtype=np.float64)
    total = counts_R.sum()
    ratio = float(sums_R.sum() / total)
    rows = len(sums_R)
    if rows < 2:
        return ratio, None
    residuals_R = sums_R - ratio * counts_R
    variance = float((residuals_R**2).sum()) * rows / (rows - 1) / float(total) ** 2
    return ratio, float(np.sqrt(variance))
