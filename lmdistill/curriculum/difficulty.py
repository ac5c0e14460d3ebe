"""How hard a row is: one decorated function a measure, from what is known of the rows to a number each.

Axes: R rows of the data, T tokens in a row, D documents in a block of rows, J judges (teachers of an ensemble).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS
from lmdistill.errors import RecipeError, nearest
from lmdistill.signals.integrity import unknown_next

F64 = NDArray[np.float64]
BLOCK = 64  # rows read at once


class Rows(Protocol):
    """A teacher cache, as far as a difficulty reads it."""

    @property
    def folder(self) -> Any:
        """Where it is."""

    @property
    def rows(self) -> int:
        """Rows R."""

    def read(self, rows: Any) -> Any:
        """A `SignalsBatch` of these rows."""


@dataclass(frozen=True)
class Sight:
    """What a difficulty may look at."""

    cache: Rows
    judges: Sequence[Rows]  # caches of other teachers, row for row of the same tokens
    student: Callable[[], F64]  # the student's mean loss on each row `[R]`, in nats, before training: a forward pass
    success: Callable[[], F64]  # success rates `[R]` that came with the data


Difficulty = Callable[[Sight], F64]


@dataclass(frozen=True)
class Measure:
    """A difficulty with what it needs."""

    function: Difficulty
    needs: str  # what has to be there beside the rows: nothing, student, judges, success

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return next(iter((self.function.__doc__ or "").strip().splitlines()), "")


_MEASURES: dict[str, Measure] = {}


def difficulty(name: str, needs: str = "nothing") -> Callable[[Difficulty], Difficulty]:
    """Register a measure of rows `[R]`: the larger, the harder."""

    def register(function: Difficulty) -> Difficulty:
        _MEASURES[name] = Measure(function, needs)
        return function

    return register


def measures() -> dict[str, Measure]:
    """All measures by name."""
    return dict(sorted(_MEASURES.items()))


def find_measure(name: str) -> Measure:
    """The measure called `name`; RecipeError with the nearest name where there is none."""
    if name in _MEASURES:
        return _MEASURES[name]
    raise RecipeError(
        f"no difficulty is called '{name}'{nearest(name, _MEASURES)}", fix=f"one of: {', '.join(measures())}"
    )


def row_means(values_RT: NDArray[Any], counts_RT: NDArray[np.bool_]) -> F64:
    """Means over the positions that count `[R]`; 0 in rows where none does: nothing is to be learnt there."""
    sums_R = np.where(counts_RT, values_RT, 0.0).sum(1, dtype=np.float64)
    means_R: F64 = sums_R / np.maximum(1, counts_RT.sum(1))
    return means_R


@difficulty("teacher_loss")
def teacher_loss(sight: Sight) -> F64:
    """The cached teacher's mean loss on the row: text that surprises even the teacher is hard."""
    blocks = (row_means(-lp_RT, counts_RT) for lp_RT, counts_RT, _ in _blocks(sight.cache))
    return np.concatenate(list(blocks))


@difficulty("loss_gap", needs="student")
def loss_gap(sight: Sight) -> F64:
    """The student's loss less the teacher's: hard is what the teacher knows and the student does not."""
    return sight.student() - teacher_loss(sight)


@difficulty("success_rate", needs="success")
def success_rate(sight: Sight) -> F64:
    """1 − the success rate that the data names for its items (the corpus' key `success`)."""
    return 1.0 - sight.success()


@difficulty("ensemble", needs="judges")
def ensemble(sight: Sight) -> F64:
    """−log of the chance that a teacher, picked from several caches, says an answer of the row token for token.

    With S_jd the sum of judge j's log-probs of the tokens of answer d, the chance is mean_jd exp S_jd: the expected
    success rate by exact match. Its logarithm has the same order, and tells long answers apart that no one gets.
    """
    caches = (sight.cache, *sight.judges)
    chances = [np.concatenate([_log_chances(*block) for block in _blocks(cache)]) for cache in caches]
    summed_R: F64 = np.logaddexp.reduce(np.stack(chances), axis=0)
    chance_R: F64 = np.log(len(caches)) - summed_R
    return chance_R


def _blocks(cache: Rows) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]]:
    """The teacher's log-probs of the next tokens, what counts, and first tokens of documents; BLOCK rows at a time."""
    for start in range(0, cache.rows, BLOCK):
        batch = cache.read(range(start, min(start + BLOCK, cache.rows)))
        counts_RT = (batch.flags_RT & LOSS) > 0
        if np.isnan(batch.lp_next_RT[counts_RT]).any():
            raise unknown_next(cache.folder, "choose another `difficulty`")
        yield batch.lp_next_RT, counts_RT, (batch.flags_RT & DOC_START) > 0


def _log_chances(lp_RT: NDArray[np.float32], counts_RT: NDArray[np.bool_], starts_RT: NDArray[np.bool_]) -> F64:
    """log of the mean chance `[R]` of the answers in each row; 0 in rows without an answer."""
    rows, length = lp_RT.shape
    document_RT = np.cumsum(starts_RT, 1) + np.arange(rows)[:, None] * (length + 1)
    used, place_N = np.unique(document_RT[counts_RT], return_inverse=True)
    sums_D = np.bincount(place_N, lp_RT[counts_RT].astype(np.float64), minlength=len(used))
    row_D = used // (length + 1)
    log_R = np.full(rows, -np.inf)
    np.logaddexp.at(log_R, row_D, sums_D)
    answers_R = np.bincount(row_D, minlength=rows)
    return np.where(answers_R > 0, log_R - np.log(np.maximum(1, answers_R)), 0.0)
