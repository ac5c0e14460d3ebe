"""Rows as prompts, for engines that answer request by request, and the answers put back into rows.

Axes: B rows, T tokens in a row, N tokens of a prompt, K entries of a token.
A prompt is a row, or with `isolate` a document's part of it: documents that are asked by themselves cannot see each
other. It carries one token more than is scored, since an engine says of a prompt's tokens what it expected there: the
token after it, and after a row's end any token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import StageError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.engine import EngineOptions, TeacherEngine, TopK
from lmdistill.teachers.logprobs import Entries, top_k


@dataclass(frozen=True)
class Prompt:
    """Tokens [start, stop) of a row, and one token after them."""

    row: int
    start: int
    stop: int
    tokens: list[int]

    @property
    def at(self) -> tuple[int, slice]:
        """Where its tokens are in a batch."""
        return self.row, slice(self.start, self.stop)


def prompts_of(tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_], isolate: bool) -> list[Prompt]:
    """Cut rows into prompts: one a row, or one a document of a row where `isolate` is set."""
    prompts = []
    for row, tokens_T in enumerate(tokens_BT):
        inside = np.flatnonzero(starts_BT[row, 1:]) + 1 if isolate else np.empty(0, np.int64)
        edges = [0, *inside.tolist(), len(tokens_T)]
        tokens = [*tokens_T.tolist(), int(tokens_T[-1])]
        prompts += [Prompt(row, start, stop, tokens[start : stop + 1]) for start, stop in pairwise(edges)]
    return prompts


def empty_top_k(tokens_BT: NDArray[Any], k: int) -> TopK:
    """Arrays to be filled for these rows; `lp_next` is NaN."""
    rows, length = tokens_BT.shape
    return TopK(
        np.empty((rows, length, k), np.int32),
        np.empty((rows, length, k), np.float32),
        np.empty((rows, length), np.float32),
        np.full((rows, length), np.nan, np.float32),
    )


class PromptEngine(ABC):
    """An engine that is asked prompt by prompt; subclasses open it and say how it is asked."""

    _options: EngineOptions

    @abstractmethod
    def ask(self, prompts: Sequence[list[int]], k: int) -> Iterable[Entries]:
        """What the teacher says of each prompt's tokens but the first, in order."""

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Top-K of every position. Raises StageError where an answer is not about the tokens asked."""
        options = self._options
        prompts = prompts_of(tokens_BT, starts_BT, options.isolate)
        scored = empty_top_k(tokens_BT, options.k)
        for prompt, entries in zip(prompts, self.ask([p.tokens for p in prompts], options.k), strict=True):
            if not np.array_equal(entries.token_N, prompt.tokens[1:]):
                raise StageError("the engine answered about other tokens than it was asked")
            ids_NK, logp_NK, tail_N = top_k(entries, options.vocab_size)
            scored.ids_BTK[prompt.at], scored.logp_BTK[prompt.at] = ids_NK, logp_NK
            scored.tail_BT[prompt.at], scored.lp_next_BT[prompt.at] = tail_N, entries.lp_token_N
        scored.lp_next_BT[:, -1] = np.nan
        return scored


class DocumentsApart:
    """Another engine, given every document of a row by itself: isolation that asks nothing of the model."""

    def __init__(self, inner: TeacherEngine) -> None:
        self._inner = inner

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Open the inner engine for rows of one document."""
        self._k = options.k
        self._inner.open(teacher, replace(options, isolate=False))

    def version(self) -> str:
        """The inner engine's."""
        return self._inner.version()

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Top-K of every position, a document at a time."""
        scored = empty_top_k(tokens_BT, self._k)
        for prompt in prompts_of(tokens_BT, starts_BT, isolate=True):
            tokens_1N = np.asarray([prompt.tokens], tokens_BT.dtype)
            part = self._inner.score(tokens_1N, np.zeros(tokens_1N.shape, bool))
            for whole, piece in zip(vars(scored).values(), vars(part).values(), strict=True):
                whole[prompt.at] = piece[0, :-1]
        scored.lp_next_BT[:, -1] = np.nan
        return scored
