"""What is measured while a shard is written: sums that add up over shards in order, so that results are exact.

Axes: R rows, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import LOSS, PAD
from lmdistill.signals.codec import code_kl, logsumexp
from lmdistill.teachers.engine import TopK

BINS_PER_DECADE, LOWEST_DECADE, DECADES = 40, -12, 13
BINS = BINS_PER_DECADE * DECADES


@dataclass
class Statistics:
    """Sums over the tokens of a shard (or of several); `summary` turns them into figures."""

    tokens: int = 0  # without padding
    targets: int = 0  # positions with LOSS
    head_mass: float = 0.0
    entropy: float = 0.0
    nll: float = 0.0
    observed: int = 0  # targets whose token is among the K
    kl: float = 0.0
    kl_max: float = 0.0
    sum_error_max: float = 0.0  # |head + tail − 1| as decoded
    kl_histogram: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(
        self,
        tokens_RT: NDArray[Any],
        flags_RT: NDArray[np.uint8],
        exact: TopK,
        decoded_RTK: NDArray[np.float32],
        decoded_tail_RT: NDArray[Any],
    ) -> None:
        """Count one batch: what the teacher said (`exact`) against what a reader will decode."""
        real_RT = (flags_RT & PAD) == 0
        target_RT = ((flags_RT & LOSS) != 0) & ~np.isnan(exact.lp_next_BT)  # a row's last position has no next
        head_RT = logsumexp(exact.logp_BTK)
        kl = code_kl(exact.logp_BTK, exact.tail_BT, decoded_RTK, decoded_tail_RT)[real_RT]
        sums_RT = np.exp(logsumexp(decoded_RTK)) + np.exp(decoded_tail_RT.astype(np.float64))
        next_RT = np.roll(tokens_RT, -1, axis=1)
        among_RT = (exact.ids_BTK == next_RT[..., None]).any(axis=-1)
        self.tokens += int(real_RT.sum())
        self.targets += int(target_RT.sum())
        self.head_mass += float(np.minimum(np.exp(head_RT[real_RT]), 1.0).sum())
        self.entropy += float(coarse_entropy(exact)[real_RT].sum())
        self.nll -= float(exact.lp_next_BT[target_RT].astype(np.float64).sum())
        self.observed += int((among_RT & target_RT).sum())
        self.kl += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max(initial=0.0)))
        self.sum_error_max = max(self.sum_error_max, float(np.abs(sums_RT[real_RT] - 1).max(initial=0.0)))
        place = (np.log10(np.maximum(kl, 10.0**LOWEST_DECADE)) - LOWEST_DECADE) * BINS_PER_DECADE
        counts = np.bincount(np.clip(place.astype(np.int64), 0, BINS - 1), minlength=BINS)
        self.kl_histogram = [a + int(b) for a, b in zip(self.kl_histogram, counts, strict=True)]

    def merge(self, other: Statistics) -> None:
        """Add another shard's sums."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            if name == "kl_histogram":
                setattr(self, name, [a + b for a, b in zip(mine, value, strict=True)])
            else:
                setattr(self, name, max(mine, value) if name.endswith("_max") else mine + value)

    def kl_quantile(self, share: float) -> float | None:
        """The KL that `share` of the tokens stay below: a histogram bin's upper edge, at most 6% too high."""
        if not self.tokens:
            return None
        index = int(np.searchsorted(np.cumsum(self.kl_histogram), share * self.tokens))
        return float(10.0 ** (LOWEST_DECADE + (index + 1) / BINS_PER_DECADE))

    def summary(self, bytes_per_token: float | int | None) -> dict[str, float | int | None]:
        """Means and quantiles for the manifest; None where there is nothing to average."""
        tokens, targets = max(self.tokens, 1), max(self.targets, 1)
        return {
            "tokens": self.tokens,
            "targets": self.targets,
            "bytes_per_token": bytes_per_token,
            "head_mass": self.head_mass / tokens if self.tokens else None,
            "entropy": self.entropy / tokens if self.tokens else None,
            "teacher_nll": self.nll / targets if self.targets else None,
            "observed_in_top_k": self.observed / targets if self.targets else None,
            "kl_mean": self.kl / tokens if self.tokens else None,
            "kl_p50": self.kl_quantile(0.5),
            "kl_p99": self.kl_quantile(0.99),
            "kl_max": self.kl_max,
            "sum_error_max": self.sum_error_max,
        }


def coarse_entropy(exact: TopK) -> NDArray[np.float64]:
    """Entropy in nats of the K entries and the rest as one, `[R, T]`: a lower bound of the teacher's entropy."""
    logp = np.concatenate([exact.logp_BTK, exact.tail_BT[..., None]], axis=-1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms: NDArray[np.float64] = np.where(np.isfinite(logp), np.exp(logp) * logp, 0.0)
    entropy: NDArray[np.float64] = -terms.sum(axis=-1)
    return entropy
