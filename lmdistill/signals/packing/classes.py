"""Classes of positions by what the teacher expects there: hard clustering by likelihood, the same bits everywhere.

Axes: N tokens of a segment, S a sample of them, K entries of a token, W ranks of ids that are told apart, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
F32 = NDArray[np.float32]

SAMPLE, ROUNDS = 32_768, 8  # positions and rounds of the clustering
KNOWN = 8192  # rarer ids count as one
PRIOR = 200.0  # candidates' worth of the whole segment in every class
CHUNK = 2048  # positions scored at a time: their scores stay in the processor's cache
SCALE = 64.0  # scores are whole numbers held in float32: their sums are exact in any order


def cluster(ranks_NK: Ints, context_N: Ints, kept_NK: NDArray[np.bool_] | None, classes: int) -> Ints:
    """A class for each position; at first positions with the same token (`context_N`, by rank) are together."""
    if classes == 1:
        return np.zeros(len(ranks_NK), np.int64)
    known_NK = np.minimum(ranks_NK, KNOWN - 1)
    if kept_NK is not None:
        known_NK = np.where(kept_NK, known_NK, KNOWN)  # scores nothing
    sample = slice(None, None, -(-len(ranks_NK) // SAMPLE))
    sample_SK, class_S = known_NK[sample], context_N[sample] % classes
    for _ in range(ROUNDS):
        class_S = _best(sample_SK, _scores(sample_SK, class_S, classes))
    return _best(known_NK, _scores(sample_SK, class_S, classes))


def _scores(ranks_SK: Ints, class_S: Ints, classes: int) -> tuple[F32, F32]:
    """log2 of each rank's share of a class' candidates `[W + 1, C]`, and of each class' share `[C]`; times SCALE."""
    joint = np.bincount((ranks_SK * classes + class_S[:, None]).ravel(), minlength=(KNOWN + 1) * classes)
    counts_WC = joint.reshape(KNOWN + 1, classes)[:KNOWN].astype(np.float64)
    usual_W1 = counts_WC.sum(axis=1, keepdims=True) + 0.1
    smooth_WC = counts_WC + PRIOR * usual_W1 / usual_W1.sum()
    score_WC = np.round(SCALE * np.log2(smooth_WC / smooth_WC.sum(axis=0)))
    members_C = np.bincount(class_S, minlength=classes) + 1e-3
    share_C = np.round(SCALE * np.log2(members_C / members_C.sum()))
    nothing_1C = np.zeros((1, classes))
    return np.concatenate([score_WC, nothing_1C]).astype(np.float32), share_C.astype(np.float32)


def _best(ranks_NK: Ints, scores: tuple[F32, F32]) -> Ints:
    """The class under which a position's candidates are likeliest; of equals the first."""
    score_WC, share_C = scores
    best_N: Ints = np.empty(len(ranks_NK), np.int64)
    for start in range(0, len(ranks_NK), CHUNK):
        chunk_NK = ranks_NK[start : start + CHUNK]
        total_NC = np.broadcast_to(share_C, (len(chunk_NK), len(share_C))).copy()
        for column_N in chunk_NK.T:
            total_NC += score_WC[column_N]
        best_N[start : start + CHUNK] = total_NC.argmax(axis=1)
    return best_N
