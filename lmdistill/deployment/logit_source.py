"""What parity and the scorer need of an open file: a module of its own, since a device's portable profile packs it too.

Axes: T tokens of a sequence, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LogitSource(Protocol):
    """An open file that gives logits; rows of T tokens at a time, V of them each."""

    @property
    def n_vocab(self) -> int:
        """V."""

    def logit_chunks(self, tokens_T: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(start, logits `[C, V]`) over one sequence."""
