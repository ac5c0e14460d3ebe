"""What need not be stored in full, as other planes nearly tell it: tokens, `lp_next` and the tail.

Axes: R rows, T tokens in a row, K entries of a token.
All three ways are lossless: whatever was coded comes back, whether or not tokens and log-probs belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.codec import Companding
from lmdistill.signals.packing.streams import unzigzag, zigzag

Bits = NDArray[np.uint16]  # of float16 values
ONE = 2.0**30


def slots(tokens_RT: NDArray[Any], ids_RTK: NDArray[Any], kept_RTK: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """At which entry of position t token t+1 stands, `[R, T−1]`; K where it is not among them."""
    same_RTK = ids_RTK[:, :-1] == tokens_RT[:, 1:, None]
    if kept_RTK is not None:
        same_RTK &= kept_RTK[:, :-1]
    found: NDArray[np.int64] = np.where(same_RTK.any(axis=-1), same_RTK.argmax(axis=-1), ids_RTK.shape[-1])
    return found


def spelled(slots_RT: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Which tokens are given by themselves, `[R, T]`: a row's first, and those that are no candidate."""
    first_R1 = np.ones((len(slots_RT), 1), bool)
    return np.concatenate([first_R1, slots_RT == k], axis=1)


@dataclass(frozen=True)
class Predicted:
    """What the codes say of `lp_next` and of the tail, as float16 bits `[R, T]`; where the next token is an entry."""

    lp_next: Bits
    tail: Bits
    among: NDArray[np.bool_]


def predict(
    companding: Companding,
    top1: Bits,
    gaps_KN: NDArray[np.uint8],
    count_RT: NDArray[Any] | None,
    slots_RT: NDArray[Any],
) -> Predicted:
    """Predict from the other planes; `count_RT` is the number of entries where it is not K for all."""
    (rows, length), codes = top1.shape, len(gaps_KN)
    k = codes + 1
    slot_RT = np.concatenate([slots_RT, np.full((rows, 1), k)], axis=1)
    among_RT = slot_RT < k
    last_RT = (k if count_RT is None else count_RT.astype(np.int64)) - 1
    entry_N = np.where(among_RT, slot_RT, last_RT).ravel()
    code_N = np.zeros(rows * length, np.uint8)
    if codes:
        here_N = np.maximum(entry_N - 1, 0) * len(code_N) + np.arange(len(code_N))
        code_N = np.where(entry_N > 0, gaps_KN.ravel()[here_N], 0)
    top_RT = top1.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):  # bits that no teacher gives are coded too
        lp_RT = (top_RT - companding.table_C[code_N].reshape(rows, length)).astype(np.float16)
    return Predicted(lp_RT.view(np.uint16), _tail(companding, top_RT, gaps_KN, count_RT), among_RT)


def residual(stored: Bits, predicted: Bits) -> Bits:
    """Stored less predicted, so that near is small."""
    return zigzag(stored - predicted)


def restore(residuals: Bits, predicted: Bits) -> Bits:
    """Back from `residual`."""
    return unzigzag(residuals) + predicted


@lru_cache
def _weights(companding: Companding) -> NDArray[np.float64]:
    """e^(−gap) of each code, in whole 2⁻³⁰: sums are exact, in any order, on any machine."""
    weights: NDArray[np.float64] = np.round(np.exp(-companding.table_C.astype(np.float64)) * ONE)
    return weights


def _tail(companding: Companding, top_RT: NDArray[np.float32], gaps_KN: NDArray[np.uint8], count_RT: Any) -> Bits:
    """log(1 − head)."""
    weights_KN = _weights(companding).take(gaps_KN, mode="clip")
    if count_RT is not None:
        weights_KN[np.arange(1, len(gaps_KN) + 1)[:, None] >= count_RT.ravel()] = 0
    spread_RT = (weights_KN.sum(axis=0) + ONE).reshape(top_RT.shape) / ONE
    with np.errstate(all="ignore"):
        head_RT = np.exp(top_RT.astype(np.float64)) * spread_RT
        rest_RT = np.where(head_RT < 1, np.log1p(-np.minimum(head_RT, 1)), -np.inf)
        bits: Bits = rest_RT.astype(np.float16).view(np.uint16)
    return bits
