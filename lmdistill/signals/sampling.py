"""How ids are drawn from the teacher, and what a draw is worth: the sampled cache's arithmetic, without the teacher.

Axes: R rows, T tokens in a row, n draws of a token, K entries of a token.
Draw j of n comes from the j-th n-th of the distribution: u = (j + U)/n of its cumulative mass. Each id then comes n·r
times in the mean, as with independent draws, and no statistic that is linear in the counts has more variance
(proportional stratification). The uniforms are a function of the seed, the split, the row's number and
the position: not of batches, workers or where a run was taken up again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.codec import F32, half_step_f16

MOST_DRAWS = 255  # a count is a byte


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn: n times from r ∝ p^t. Recorded in the manifest as part of the layout."""

    draws: int
    temperature: float = 1.0  # t; below 1 the tail is drawn more often
    seed: int = 0

    @property
    def weighted(self) -> bool:
        """Whether p/r is not 1 for all ids."""
        return self.temperature != 1.0

    def uniforms(self, split: str, first_row: int, rows: int, length: int) -> NDArray[np.float64]:
        """A number from each n-th of [0, 1), ascending, for each token of some rows of a split: `[R, T, n]`.

        A row's numbers are a stretch of Philox's counter under a key of seed and split.
        """
        key = np.frombuffer(hashlib.sha256(f"{self.seed}/{split}".encode()).digest()[:16], "<u8")
        found = np.empty((rows, length, self.draws))
        for row in range(rows):
            raw = np.random.Philox(counter=[0, first_row + row, 0, 0], key=key).random_raw(length * self.draws)
            found[row] = (raw >> np.uint64(11)).reshape(length, self.draws) * 2.0**-53
        found += np.arange(self.draws)
        found /= self.draws
        return np.minimum(found, np.nextafter(1.0, 0.0))  # (n − 1 + U)/n may round to 1

    def weigh(self, counts_RTK: NDArray[np.uint8], logp_RTK: F32, log_z_RT: F32 | None, out_RTK: F32) -> None:
        """Write (c/n)·(p/r) of each entry, where r = p^t/z: its mean over draws is p. `log_z_RT` is None at t = 1."""
        np.multiply(counts_RTK, np.float32(1 / self.draws), out=out_RTK, dtype=np.float32)
        if log_z_RT is not None:
            with np.errstate(invalid="ignore"):  # −inf of entries that are not there, at t > 1
                ratio_RTK = np.exp(np.float32(1 - self.temperature) * logp_RTK + log_z_RT[..., None])
            out_RTK *= np.where(counts_RTK > 0, ratio_RTK, np.float32(0))

    def surely_drawn(self, log_z_RT: F32 | None, shape: tuple[int, ...]) -> F32:
        """The log-prob from which an id cannot have been missed, `[R, T]`.

        Two n-ths of the mass hold one whole n-th, whichever ids come before; so r ≥ 2/n is enough.
        """
        enough = np.full(shape, np.log(2 / self.draws), np.float32)
        if log_z_RT is None:
            return enough
        bound: F32 = (enough + log_z_RT + half_step_f16(log_z_RT)) / np.float32(self.temperature)
        return bound
