"""Expected calibration error: how far a model's confidence is from how often it is right.

Predictions are put into bins of equal width by the probability of their likeliest token; the error is the mean over
predictions of |accuracy − confidence| of their bin. 0: of all tokens it gives 70%, 70% come.

Axes: N predictions, V vocabulary, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BINS = 15  # as is usual in the literature


class Calibration:
    """Gathers predictions; `error()` is that of all so far."""

    def __init__(self, bins: int = BINS) -> None:
        self.counts_B = np.zeros(bins, np.int64)
        self.excess_B = np.zeros(bins)  # Σ (confidence − right), in float64

    def add(self, log_x_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Predictions by their log-probabilities [N, V] and the tokens that came [N]."""
        top_N, chosen_N = log_x_NV.max(-1)
        sure_N = np.exp(top_N.double().numpy(force=True))
        right_N = (chosen_N == targets_N).numpy(force=True)
        bins = len(self.counts_B)
        place_N = np.clip(np.ceil(sure_N * bins).astype(np.int64) - 1, 0, bins - 1)  # (b/B, (b+1)/B]
        self.counts_B += np.bincount(place_N, minlength=bins)
        self.excess_B += np.bincount(place_N, weights=sure_N - right_N, minlength=bins)

    def error(self) -> float | None:
        """Expected calibration error, 0 to 1; None before the first prediction."""
        total = int(self.counts_B.sum())
        return float(np.abs(self.excess_B).sum() / total) if total else None
