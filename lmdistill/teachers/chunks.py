"""Chunks of logits over rows of tokens, and their reduction to what a teacher says.

Axes: B rows, T tokens in a row, N = B·T tokens, C tokens of one chunk, V vocabulary, K entries of a token.
B·T·V is never held: an engine yields one chunk after the other, and each is reduced before the next is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmdistill.teachers.engine import TeacherEngine, TopK
from lmdistill.teachers.reduction import reduce_logits

Chunks = Iterator[tuple[int, Any]]  # (first of the N tokens, logits [C, V] as a tensor)


class LogitEngine(TeacherEngine, Protocol):
    """An engine that yields the logits of the whole vocabulary; `logits=True` in the registry."""

    def logit_chunks(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> Chunks:
        """Logits `[C, V]` of all N tokens in order, V the real vocabulary; a chunk holds until the next is asked for.

        To be consumed under `torch.inference_mode()`.
        """


def reduce_chunks(chunks: Iterable[tuple[int, Any]], tokens_BT: NDArray[Any], k: int) -> TopK:
    """The top K, the tail and `lp_next` of rows of tokens from chunks of their logits."""
    import torch

    rows, length = tokens_BT.shape
    next_N = torch.from_numpy(np.roll(tokens_BT, -1, axis=1).astype(np.int64).reshape(-1))
    parts = []
    with torch.inference_mode():
        for start, logits_CV in chunks:
            following = next_N[start : start + len(logits_CV)].to(logits_CV.device)
            parts.append([column.cpu() for column in reduce_logits(logits_CV, following, k)])
    ids, logp, tail, lp_next = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    lp_next_BT = lp_next.reshape(rows, length)
    lp_next_BT[:, -1] = np.nan
    return TopK(ids.reshape(rows, length, -1), logp.reshape(rows, length, -1), tail.reshape(rows, length), lp_next_BT)
