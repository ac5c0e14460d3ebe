"""Whether another program's rows stand where we read them: text says itself which token a prediction was of.

A teacher's likely tokens hold the next token far more often than any other; where they hold the token before it or
after it more often, the rows are shifted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError
from lmdistill.signals.exchange.document import Document

OFFSETS = (-1, 0, 1, 2)  # of the token that is looked for among the entries of position t, from t
NEXT = OFFSETS.index(1)
ENOUGH = 2048  # positions for a verdict before the end
FEWEST = 32  # for any verdict
CLEARLY = 0.1  # of the positions


class Offsets:
    """Counts, document by document, which neighbour the entries hold."""

    def __init__(self, alignment: str) -> None:
        self.alignment = alignment
        self._hits, self._positions, self._judged = np.zeros(len(OFFSETS), np.int64), 0, False

    def add(self, document: Document, ids_LK: NDArray[np.int32]) -> None:
        """Count the scored positions of a document, or its part, with these entries; judges once there are enough."""
        length = len(ids_LK)
        at_N = np.flatnonzero(document.scored_L[: length - 2])
        at_N = at_N[at_N > 0]
        ids_NK = ids_LK[at_N]
        for place, offset in enumerate(OFFSETS):
            self._hits[place] += int((ids_NK == document.ids_L[at_N + offset, None]).any(axis=1).sum())
        self._positions += len(at_N)
        if self._positions >= ENOUGH and not self._judged:
            self.judge()

    def judge(self) -> None:
        """Raise PreflightError where another token than the next is among the entries more often."""
        self._judged = True
        if self._positions < FEWEST:
            return
        shares = self._hits / self._positions
        best = int(shares.argmax())
        if shares[best] <= shares[NEXT] + CLEARLY:
            return
        other = {0: "same", 2: "next"}.get(OFFSETS[best])
        fits = other is not None and other != self.alignment
        raise PreflightError(
            f"the log-probs are shifted by {OFFSETS[best] - 1:+d} against the tokens",
            why=f"the next token is among the entries at {shares[NEXT]:.0%} of {self._positions} positions, the token "
            f"{OFFSETS[best]:+d} from them at {shares[best]:.0%}",
            fix=f"import with --alignment {other}" if fits else "make the data anew: its rows do not fit its tokens",
        )
