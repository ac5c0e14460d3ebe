"""The code of a token's top-K log-probs: an f16 top-1, one byte a gap, an f16 tail; its error bounds.

Axes: N tokens (any leading shape), K entries of a token, C = 256 codes.
A gap g = logp[0] − logp[k] ≥ 0 becomes the nearest of 256 values ĝ(c) = −a·log(1 − (c/255)·(1 − e^(−G/a))).
The step grows as e^(g/a): with a = 3 the density of values is ∝ p^(1/3), which minimises the KL of the code.
The stored top-1 is renormalised so that head + tail = 1, hence decoding is `top1 − table[code]`: no exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]
F64 = NDArray[np.float64]

CODES = 256
TAIL_SHIFT = 0.01  # nats the tail may move to take up the top-1's rounding: costs at most tail mass × 5e-5 nats
TINY_HALF_STEP = 2.0**-25  # half a step of f16 below its normal range


def logsumexp(values: NDArray[Any]) -> F64:
    """log Σ exp over the last axis, in float64; −inf where every entry is −inf."""
    wide = values.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: F64 = np.log(np.exp(wide - safe).sum(axis=-1)) + safe[..., 0]
    return total


def half_step_f16(values: NDArray[Any]) -> F32:
    """The most that rounding to f16 can have moved each value: 2⁻¹¹ of it, at least half a subnormal step."""
    bound: F32 = np.maximum(np.abs(values).astype(np.float32) * np.float32(2.0**-11), np.float32(TINY_HALF_STEP))
    return bound


@dataclass(frozen=True)
class Encoded:
    """A batch as it is stored: top1, tail `[N]` f16 and gap codes `[N, K−1]` u8."""

    top1_N: F16
    tail_N: F16
    gaps_NK: NDArray[np.uint8]


@dataclass(frozen=True)
class Companding:
    """The gap code: `a` bends it, `span` (G) is the widest gap it can say, in nats. Recorded in the manifest."""

    a: float = 3.0
    span: float = 20.0

    @cached_property
    def table_C(self) -> F32:
        """The gap each code stands for, ascending from 0 to G nats."""
        share = np.arange(CODES) / (CODES - 1) * -np.expm1(-self.span / self.a)
        table: F32 = (-self.a * np.log1p(-share)).astype(np.float32)
        return table

    @cached_property
    def pairs_C(self) -> NDArray[np.complex64]:
        """The gaps of two neighbouring codes as one value, `[65,536]`: half the look-ups, a third less time."""
        codes = np.arange(CODES**2, dtype=np.uint16).view(np.uint8)
        pairs: NDArray[np.complex64] = self.table_C[codes].view(np.complex64)
        return pairs

    @cached_property
    def edges_C(self) -> F32:
        """Midpoints between neighbouring codes, `[255]`: a gap is coded as the nearest value."""
        middle: F32 = ((self.table_C[1:] + self.table_C[:-1]) / 2).astype(np.float32)
        return middle

    @cached_property
    def half_step_C(self) -> F32:
        """The farthest a coded gap can lie from its code's value; for the last code only towards smaller gaps."""
        steps = np.diff(self.table_C)
        wider = np.maximum(np.append(0.0, steps), np.append(steps, 0.0))
        half: F32 = (wider / 2).astype(np.float32)
        return half

    def encode(self, logp_NK: F32, tail_N: F32) -> Encoded:
        """Code descending log-probs `[N, K]` and the tail's log mass `[N]` (−inf where K is the vocabulary).

        Entries with log-prob −inf do not count; their code is 0.
        """
        gaps_NK = logp_NK[..., :1] - logp_NK[..., 1:]
        none_NK = np.isinf(gaps_NK)
        codes_NK = np.searchsorted(self.edges_C, gaps_NK).astype(np.uint8)
        codes_NK[none_NK] = 0
        spread_N = logsumexp(self._with_zero(np.where(none_NK, np.float32(-np.inf), -self.table_C[codes_NK])))
        top1_N = np.minimum(logsumexp(logp_NK) - spread_N, 0.0).astype(np.float16)
        head_N = np.exp(top1_N.astype(np.float64) + spread_N)
        with np.errstate(divide="ignore", invalid="ignore"):
            rest_N = np.log1p(-head_N)
            near_N = np.abs(rest_N - tail_N) < TAIL_SHIFT
        return Encoded(top1_N, np.where(near_N, rest_N, tail_N).astype(np.float16), codes_NK)

    def decode(self, top1_N: NDArray[Any], gaps_NK: NDArray[np.uint8], out_NK: F32) -> None:
        """Write the log-probs `[N, K]` of stored codes into `out_NK`, descending."""
        top = top1_N.astype(np.float32)
        out_NK[..., 0] = top
        if gaps_NK.size % 2 or not gaps_NK.flags.c_contiguous:
            gaps = np.take(self.table_C, gaps_NK, mode="clip")  # "clip" skips the bounds check, twice as fast
        else:
            codes = gaps_NK.reshape(-1).view(np.uint16)
            gaps = np.take(self.pairs_C, codes, mode="clip").view(np.float32).reshape(gaps_NK.shape)
        np.subtract(top[..., None], gaps, out=out_NK[..., 1:])

    @staticmethod
    def _with_zero(rest_NK: F32) -> F32:
        """Prepend the top-1's own gap, 0."""
        return np.concatenate([np.zeros((*rest_NK.shape[:-1], 1), np.float32), rest_NK], axis=-1)


@lru_cache
def renormalisation_bound(companding: Companding, k: int) -> float:
    """The most that renormalising can move the top-1 at K = k, in nats.

    It moves by log Σe^(−ĝ) − log Σe^(−g), a mean of the gaps' errors under weights ∝ e^(−g); the worst such mean
    has all K−1 entries at one gap, so the largest over the 256 codes bounds it.
    """
    half = companding.half_step_C.astype(np.float64)
    weight = (k - 1) * np.exp(-(companding.table_C - half))
    # A gap beyond the last code's value adds at most its own e^(−G) to the sum.
    return float((weight / (1 + weight) * half).max() + (k - 1) * np.exp(-companding.span))


def code_kl(logp_NK: F32, tail_N: F32, decoded_NK: F32, decoded_tail_N: NDArray[Any]) -> F64:
    """KL in nats of the exact (K entries + rest) distribution from the decoded one, `[N]`.

    In its form for measures that need not sum to one, Σ p·log(p/q) − p + q: never negative, and it also counts
    what rounding leaves of head + tail ≠ 1.
    """
    p_log = np.concatenate([logp_NK, tail_N[..., None]], axis=-1).astype(np.float64)
    q_log = np.concatenate([decoded_NK, decoded_tail_N[..., None].astype(np.float32)], axis=-1).astype(np.float64)
    p, q = np.exp(p_log), np.exp(q_log)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (p_log - q_log), 0.0) - p + q
    total: F64 = np.maximum(terms.sum(axis=-1), 0.0)
    return total
