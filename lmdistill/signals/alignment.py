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


def check_alignment(
    same_RTK: NDArray[np.bool_],
    gaps_RTK: NDArray[np.uint8],
    logp_RTK: NDArray[np.float32],
    lp_next_RT: NDArray[np.float32],
    companding: Companding,
) -> Misaligned | None:
    """Check one batch; `same_RTK` [R, T−1, K] says where an id is the next token. None where all is well."""
    rows, length, k = same_RTK.shape
    nan_RT = np.isnan(lp_next_RT)
    if rows and (nan_RT[:, :-1].any() or not nan_RT[:, -1].all()):
        row, position = (int(i) for i in np.argwhere(nan_RT != (np.arange(length + 1) == length))[0])
        return Misaligned(row, position, float(lp_next_RT[row, position]), float("nan"), 1, rows * length)
    flat, entry = np.divmod(np.flatnonzero(same_RTK), k)
    at = np.divmod(flat, length)
    column = np.where(entry > 0, entry - 1, 0)
    code = np.where(entry > 0, gaps_RTK[*at, column] if k > 1 else 0, 0)
    decoded_RT = logp_RTK[:, :-1, -1].copy()
    lowest = gaps_RTK[:, :-1, -1] if k > 1 else np.zeros((rows, length), np.uint8)
    bound_RT = companding.half_step_C[lowest]
    below_RT = np.ones((rows, length), bool)  # the next token is less likely than any entry, or out of the code's reach
    decoded_RT[at] = logp_RTK[*at, entry]
    bound_RT[at] = companding.half_step_C[code]
    below_RT[at] = code == CODES - 1
    expected_RT = lp_next_RT[:, :-1]
    bound_RT = bound_RT + half_step_f16(logp_RTK[:, :-1, 0]) + half_step_f16(expected_RT)
    bound_RT += renormalisation_bound(companding, k) + FLOAT32_SLACK
    excess_RT = expected_RT - decoded_RT
    bad_RT = ~np.where(below_RT, excess_RT <= bound_RT, np.abs(excess_RT) <= bound_RT)
    return _first(bad_RT, expected_RT, decoded_RT)


def _first(bad_RT: NDArray[np.bool_], expected_RT: NDArray[Any], decoded_RT: NDArray[Any]) -> Misaligned | None:
    failures = np.argwhere(bad_RT)
    if not len(failures):
        return None
    row, position = (int(i) for i in failures[0])
    expected, decoded = float(expected_RT[row, position]), float(decoded_RT[row, position])
    return Misaligned(row, position, expected, decoded, len(failures), bad_RT.size)
