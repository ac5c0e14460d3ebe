"""The code of a teacher's hidden states: float16, or int8 with one scale a token and layer; its error bound.

Axes: R rows, T tokens in a row, L chosen layers, D hidden width.
int8: with a = max |x| over the D values of a token in a layer, the scale s is the smallest float16 that is at least
a / 127, a value is stored as round(x / s) and read as s times that, hence |x̂ − x| ≤ s / 2 and s ≤ a/127 · (1 + 2⁻¹⁰)
+ 2⁻²⁴: at most 0.4% of the largest of the D values. float16: half a step of float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import StageError

F32 = NDArray[np.float32]
LEVELS = 127  # the largest code: the code is symmetric, −128 is not used


@dataclass(frozen=True)
class HiddenLayout:
    """Which hidden states are kept and how. Recorded in the manifest as part of the layout."""

    layers: tuple[int, ...]  # 0: the embeddings; n: what block n gives on; the last: after the final norm
    width: int  # D
    dtype: str  # float16 | int8

    def row_dtype(self, row_tokens: int) -> np.dtype[Any]:
        """One stored row [T]: planes of scales, for int8, and of values; packed, little-endian."""
        shape = (row_tokens, len(self.layers), self.width)
        if self.dtype == "float16":
            return np.dtype([("values", "<f2", shape)])
        return np.dtype([("scales", "<f2", shape[:2]), ("values", "i1", shape)])

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes beside its log-probs."""
        return self.row_dtype(1).itemsize

    def encode(self, hidden_RTLD: F32) -> NDArray[Any]:
        """Stored rows [R]; raises StageError for what float16 or its scale cannot say."""
        raw_R = np.empty(len(hidden_RTLD), self.row_dtype(hidden_RTLD.shape[1]))
        with np.errstate(over="ignore"):
            if self.dtype == "float16":
                raw_R["values"] = limits = hidden_RTLD.astype(np.float16)
            else:
                raw_R["scales"] = limits = int8_scales(hidden_RTLD)
        if not np.isfinite(limits).all():
            raise StageError(
                f"the teacher's hidden states of layers {list(self.layers)} do not fit {self.dtype}",
                why=f"the largest is {np.abs(hidden_RTLD).max():.4g}",
                fix="set `hidden_dtype: int8`, whose range is 127 times as wide, or leave that layer out",
            )
        if self.dtype == "int8":
            scales_RTL1 = raw_R["scales"].astype(np.float32)[..., None]
            codes = np.divide(hidden_RTLD, scales_RTL1, out=np.zeros_like(hidden_RTLD), where=scales_RTL1 > 0)
            raw_R["values"] = np.rint(codes).clip(-LEVELS, LEVELS)
        return raw_R

    def decode(self, raw_R: NDArray[Any]) -> F32:
        """Hidden states `[R, T, L, D]` in float32."""
        hidden_RTLD: F32 = raw_R["values"].astype(np.float32)
        if self.dtype == "int8":
            hidden_RTLD *= raw_R["scales"].astype(np.float32)[..., None]
        return hidden_RTLD


def int8_scales(hidden_RTLD: F32) -> NDArray[np.float16]:
    """The scale of each token and layer `[R, T, L]`: rounded up, so that no value lies beyond the largest code."""
    exact_RTL = np.abs(hidden_RTLD).max(axis=-1) / np.float32(LEVELS)
    near_RTL = exact_RTL.astype(np.float16)
    above_RTL = np.nextafter(near_RTL, np.float16(np.inf))
    scales: NDArray[np.float16] = np.where(near_RTL.astype(np.float32) < exact_RTL, above_RTL, near_RTL)
    return scales


def int8_error_bound(largest: NDArray[Any]) -> F32:
    """The most that a value can be off in int8, from the largest magnitude among its token's D values."""
    scale = largest / LEVELS * (1 + 2.0**-10) + 2.0**-24
    bound: F32 = (scale / 2 * (1 + 1e-4)).astype(np.float32)  # the last factor: float32's own rounding in x / s
    return bound
