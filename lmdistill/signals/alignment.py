"""The proof that log-probs belong to their tokens: `lp_next` against what the codes say of the next token.

Axes: R rows, T tokens in a row, K entries of a token.
Where the next token is one of the K ids, its decoded log-prob must equal `lp_next` within the code's error; where
it is not, `lp_next` cannot lie above the K-th entry. No teacher is needed, and nothing aligned can fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.codec import CODES, Companding, half_step_f16, renormalisation_bound

FLOAT32_SLACK = 1e-5  # nats: the engine's and the decoder's own float32 rounding


@dataclass(frozen=True)
class Misaligned:
    """The first position of a batch that fails the proof, and how many of all do."""

    row: int  # within the batch
    position: int
    expected: float  # lp_next
    decoded: float  # what the codes say of the next token, or the K-th entry where it is not among them
    failures: int
    checked: int


@dataclass(frozen=True)
class Proof:
    """What is known of how rows were coded."""

    companding: Companding
    k: int  # entries of a token when its code was made: fewer may be left
    open_next: bool = False  # `lp_next` may be NaN anywhere: nothing is checked there


def check_alignment(
    same_RTK: NDArray[np.bool_],
    gaps_RTK: NDArray[np.uint8],
    logp_RTK: NDArray[np.float32],
    lp_next_RT: NDArray[np.float32],
    proof: Proof,
    last_RT: NDArray[np.int64] | None = None,
    unlisted_RT: NDArray[np.float32] | None = None,
) -> Misaligned | None:
    """Check one batch of contiguous arrays; None where all is well.

    `same_RTK` says where an id is the next token, and is False at a row's last position. `last_RT` is each token's
    last entry where that is not the K-th for all. `unlisted_RT` is the most that `lp_next` can be where the next token
    is no entry, if not the last entry's log-prob.
    """
    rows, length, k = same_RTK.shape
    companding, missing_RT = proof.companding, np.isnan(lp_next_RT)
    if proof.open_next:
        missing_RT[:, :-1] = False
    if np.count_nonzero(missing_RT) != rows or not missing_RT[:, -1].all():
        bad_RT = missing_RT != (np.arange(length) == length - 1)
        return _first(bad_RT, lp_next_RT, np.full_like(lp_next_RT, np.nan))
    if unlisted_RT is None:
        decoded_RT, code_RT = _last_entry(logp_RTK, gaps_RTK, last_RT)
    else:
        decoded_RT, code_RT = unlisted_RT.copy(), np.zeros((rows, length), np.uint8)
    below_RT = np.ones((rows, length), bool)  # less likely than any entry, or out of the code's reach
    hits = np.flatnonzero(same_RTK)
    token = hits // k
    entry = hits - token * k
    decoded_RT.reshape(-1)[token] = logp_RTK.reshape(-1)[hits]
    if k > 1:
        coded = gaps_RTK.reshape(-1)[np.maximum(hits - token - 1, 0)]  # K−1 codes a token
        code_RT.reshape(-1)[token] = np.where(entry > 0, coded, 0)
    below_RT.reshape(-1)[token] = code_RT.reshape(-1)[token] == CODES - 1
    bound_RT = companding.half_step_C[code_RT] + half_step_f16(logp_RTK[..., 0]) + half_step_f16(lp_next_RT)
    bound_RT += np.float32(renormalisation_bound(companding, proof.k) + FLOAT32_SLACK)
    excess_RT = lp_next_RT - decoded_RT  # NaN compares as no failure
    bad_RT = excess_RT > bound_RT
    bad_RT |= (excess_RT < -bound_RT) & ~below_RT
    return _first(bad_RT, lp_next_RT, decoded_RT) if bad_RT.any() else None


def _last_entry(
    logp_RTK: NDArray[np.float32], gaps_RTK: NDArray[np.uint8], last_RT: NDArray[np.int64] | None
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The last entry's log-prob and code; code 0 where it is the first."""
    if last_RT is None:
        codes = gaps_RTK[..., -1].copy() if gaps_RTK.shape[-1] else np.zeros(gaps_RTK.shape[:-1], np.uint8)
        return logp_RTK[..., -1].copy(), codes
    at_RT1 = last_RT[..., None]
    codes_RTK = np.concatenate([np.zeros((*gaps_RTK.shape[:-1], 1), np.uint8), gaps_RTK], axis=-1)
    return np.take_along_axis(logp_RTK, at_RT1, -1)[..., 0], np.take_along_axis(codes_RTK, at_RT1, -1)[..., 0]


def _first(bad_RT: NDArray[np.bool_], expected_RT: NDArray[Any], decoded_RT: NDArray[Any]) -> Misaligned:
    failures = np.argwhere(bad_RT)
    row, position = (int(i) for i in failures[0])
    expected, decoded = float(expected_RT[row, position]), float(decoded_RT[row, position])
    return Misaligned(row, position, expected, decoded, len(failures), bad_RT.size)
