"""Rows of a teacher cache as arrays a loss can use.

Axes: R rows of a batch, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class SignalsBatch:
    """Rows of the cache, decoded. Position t holds the teacher's prediction of token t+1."""

    rows: NDArray[np.int64]  # [R] indices into the split
    tokens_RT: NDArray[np.int32]
    flags_RT: NDArray[np.uint8]  # LOSS | DOC_START | PAD as in the corpus
    ids_RTK: NDArray[np.int32]  # most likely first
    logp_RTK: F32  # nats, descending; −inf: no entry, its id repeats the first
    tail_RT: F32  # log of the mass outside the K ids; −inf where K is the whole vocabulary
    lp_next_RT: F32  # the teacher's log-prob of token t+1; NaN at a row's last position
    weight_RTK: F32 | None = None  # importance weights of drawn ids; None where the ids are the top K

    @classmethod
    def empty(cls, rows: NDArray[np.int64], row_tokens: int, k: int, weighted: bool = False) -> SignalsBatch:
        """Arrays for the given rows, to be filled; `weighted` where the ids are drawn."""
        shape = (len(rows), row_tokens)
        return cls(
            rows=rows,
            tokens_RT=np.empty(shape, np.int32),
            flags_RT=np.empty(shape, np.uint8),
            ids_RTK=np.empty((*shape, k), np.int32),
            logp_RTK=np.empty((*shape, k), np.float32),
            tail_RT=np.empty(shape, np.float32),
            lp_next_RT=np.empty(shape, np.float32),
            weight_RTK=np.empty((*shape, k), np.float32) if weighted else None,
        )

    def part(self, rows: slice) -> SignalsBatch:
        """Views of some of the rows: what is written there is written here."""
        views: dict[str, Any] = {name: array[rows] for name, array in vars(self).items() if array is not None}
        return SignalsBatch(**views)
