"""Another program's predictions for one document, and what a cache takes of them.

Axes: L tokens of a document, E entries that the source has of a token, K entries that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError
from lmdistill.teachers.engine import TopK

F32 = NDArray[np.float32]

TAIL_FLOOR = 1e-6  # the least mass that is left to the rest of the vocabulary
SUM_SLACK = 0.02  # what bfloat16 and fitted curves can add to Σp = 1; more is an error
WHOLE_SLACK = 1e-3  # of Σp = 1, for sources whose entries are all there is
Fail = Callable[[str, str], Exception]  # what is wrong at a position, what is expected


@dataclass(frozen=True)
class Entries:
    """Log-probs of each position of a document; position t predicts token t+1."""

    ids_LE: NDArray[np.int64]
    logp_LE: F32  # in any order; −inf: no entry


@dataclass(frozen=True)
class Document:
    """Tokens that saw each other, and no others, when they were scored."""

    place: str  # file and row, for messages
    ids_L: NDArray[np.int64]
    targets_L: NDArray[np.bool_]  # may the token be a target
    scored_L: NDArray[np.bool_]  # positions with entries
    entries: Callable[[], Entries]

    @property
    def counted_L(self) -> NDArray[np.bool_]:
        """Positions whose prediction counts: scored, and the next token is a target."""
        counted_L = self.scored_L.copy()
        counted_L[-1] = False
        counted_L[:-1] &= self.targets_L[1:]
        return counted_L


@dataclass(frozen=True)
class Reading:
    """How a source's log-probs are understood."""

    vocab_size: int
    k: int
    temperature: float = 1.0  # at which the source's were made; undone
    renormalize: bool = False
    ragged: bool = False  # positions may have fewer than K entries

    def top_k(self, document: Document) -> TopK:
        """The K most likely of every scored position `[1, L, K]`; the others are uniform and say nothing.

        Raises PreflightError for what no teacher can have said.
        """
        found, at = document.entries(), np.flatnonzero(document.scored_L)
        ids_NE, logp_NE = _sorted(*_wide(found.ids_LE[at], found.logp_LE[at].astype(np.float64), self.k))
        self._check(document.place, at, ids_NE, logp_NE)
        logp_NE = self._at_temperature_1(document.place, at, logp_NE)
        logp_NE = self._summing(document.place, at, logp_NE)
        exact = self.uniform(len(document.ids_L))
        kept_NK = logp_NE[:, : self.k]
        rest_N = np.maximum(1 - np.exp(kept_NK).sum(axis=1), 0 if self._is_whole else TAIL_FLOOR)
        exact.ids_BTK[0, at] = np.where(np.isfinite(kept_NK), ids_NE[:, : self.k], ids_NE[:, :1])
        exact.logp_BTK[0, at] = kept_NK
        with np.errstate(divide="ignore"):
            exact.tail_BT[0, at] = -np.inf if self._is_whole else np.log(rest_N)
        next_N = np.append(document.ids_L, -1)[at + 1]
        same_NE = (ids_NE == next_N[:, None]) & np.isfinite(logp_NE)
        hit_N = same_NE.any(axis=1)
        exact.lp_next_BT[0, at[hit_N]] = logp_NE[same_NE]
        return exact

    @property
    def _is_whole(self) -> bool:
        return self.k == self.vocab_size

    def uniform(self, length: int) -> TopK:
        """What is stored where the source says nothing: such positions carry no LOSS and no `lp_next`."""
        shape, whole = (1, length, self.k), self.vocab_size
        ids = np.broadcast_to(np.arange(self.k, dtype=np.int32), shape).copy()
        rest = np.log1p(-self.k / whole) if self.k < whole else -np.inf
        return TopK(
            ids,
            np.full(shape, -np.log(whole), np.float32),
            np.full(shape[:2], rest, np.float32),
            np.full(shape[:2], np.nan, np.float32),
        )

    def _check(self, place: str, at_N: NDArray[Any], ids_NE: NDArray[Any], logp_NE: NDArray[Any]) -> None:
        """Raise PreflightError for NaN, probabilities above 1, ids outside the vocabulary or twice, too few entries."""
        there_NE = np.isfinite(logp_NE)
        self._refuse(place, at_N, np.isnan(logp_NE), "a log-prob is NaN", "numbers")
        above_NE = (logp_NE > SUM_SLACK) & (not self.renormalize)
        self._refuse(place, at_N, above_NE, "a probability is above 1", "natural log-probs, at most 0")
        wrong_NE = there_NE & ((ids_NE < 0) | (ids_NE >= self.vocab_size))
        if wrong_NE.any():
            row, column = np.argwhere(wrong_NE)[0]
            self._refuse(
                place,
                at_N,
                wrong_NE,
                f"id {ids_NE[row, column]} is no token of the tokenizer",
                f"ids below {self.vocab_size}: the source has another tokenizer than --tokenizer",
            )
        ranked_NE = np.sort(np.where(there_NE, ids_NE, -1 - np.arange(ids_NE.shape[1])), axis=1)
        self._refuse(place, at_N, ranked_NE[:, 1:] == ranked_NE[:, :-1], "an id comes twice", "each id once")
        fewest = 1 if self.ragged else self.k
        self._refuse(place, at_N, ~there_NE[:, :fewest], "entries are missing", f"{fewest}; --k takes fewer")

    def _at_temperature_1(self, place: str, at_N: NDArray[Any], logp_NE: NDArray[Any]) -> NDArray[Any]:
        """p ∝ p_τ^τ: exact where the entries are all there is, impossible where a rest is unknown."""
        if self.temperature == 1:
            return logp_NE
        rest_N = np.abs(np.exp(logp_NE).sum(axis=1) - 1)
        if (rest_N > WHOLE_SLACK).any() and not self.renormalize:
            raise PreflightError(
                f"temperature {self.temperature} cannot be undone in {place}",
                why=f"position {at_N[rest_N.argmax()]}: the entries miss {rest_N.max():.3f} of the mass, and how that "
                "is spread over the vocabulary is not known",
                fix="capture at temperature 1; or add --renormalize, which takes the entries for all there is",
            )
        return _normalised(logp_NE * self.temperature)

    def _summing(self, place: str, at_N: NDArray[Any], logp_NE: NDArray[Any]) -> NDArray[Any]:
        """The entries so that with the floor of the tail they are at most 1."""
        if self.renormalize:
            logp_NE = _normalised(logp_NE)
        mass_N = np.exp(logp_NE).sum(axis=1)
        self._refuse(
            place,
            at_N,
            (mass_N > 1 + SUM_SLACK)[:, None],
            f"the entries' probabilities sum to {mass_N.max(initial=0):.4g}",
            "at most 1. Logits can be taken with --renormalize, which loses what is outside the entries",
        )
        room = 1.0 if self._is_whole else 1 - TAIL_FLOOR
        over_N = mass_N > room if not self._is_whole else np.ones(len(mass_N), bool)
        logp_NE[over_N] -= np.log(mass_N[over_N] / room)[:, None]
        scaled: NDArray[Any] = np.minimum(logp_NE, 0.0)
        return scaled

    @staticmethod
    def _refuse(place: str, at_N: NDArray[Any], bad_NE: NDArray[np.bool_], what: str, expected: str) -> None:
        if bad_NE.any():
            position = at_N[np.argwhere(bad_NE)[0, 0]]
            raise PreflightError(
                f"{place}, position {position}: {what}", why=f"expected {expected}", fix="correct the data"
            )


def _wide(ids_NE: NDArray[np.int64], logp_NE: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """With room for K entries."""
    more = max(0, k - ids_NE.shape[1])
    width = ((0, 0), (0, more))
    return np.pad(ids_NE, width), np.pad(logp_NE, width, constant_values=-np.inf)


def _sorted(ids_NE: NDArray[np.int64], logp_NE: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Most likely first, among equals the lower id."""
    order_NE = np.lexsort((ids_NE, -np.where(np.isnan(logp_NE), 0, logp_NE)), axis=-1)
    return np.take_along_axis(ids_NE, order_NE, -1), np.take_along_axis(logp_NE, order_NE, -1)


def _normalised(logp_NE: NDArray[Any]) -> NDArray[Any]:
    top_N1 = logp_NE.max(axis=1, keepdims=True)
    scaled: NDArray[Any] = logp_NE - top_N1 - np.log(np.exp(logp_NE - top_N1).sum(axis=1, keepdims=True))
    return scaled
