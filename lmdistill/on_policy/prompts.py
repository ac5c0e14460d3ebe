"""Prompts as token ids, with the completions that the data has for them: from a corpus' rows or from records.

In a conversation's row the prompt of an assistant's turn is all of the conversation before it; every turn makes one.
A document of plain text, where every token counts, is cut after its first tokens. What a row begins in the middle of
makes none: its own beginning is in another row.

Axes: T tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.config import Source
from lmdistill.corpus.format import DOC_START, LOSS, PAD, CorpusSplit
from lmdistill.errors import PreflightError


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from; `answer` is how the data does, empty where it does not say."""

    ids: tuple[int, ...]
    answer: tuple[int, ...] = ()


def in_row(tokens_T: NDArray[Any], flags_T: NDArray[np.uint8], prompt_tokens: int) -> Iterator[Prompt]:
    """The prompts of one row of a corpus."""
    padding = np.flatnonzero(flags_T & PAD)
    end = int(padding[0]) if len(padding) else len(tokens_T)
    starts = [int(start) for start in np.flatnonzero(flags_T & DOC_START)]
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        document = [int(token) for token in tokens_T[start:stop]]
        counted_T = (flags_T[start:stop] & LOSS) > 0
        if counted_T[:1].any():  # nothing is given before the first token: plain text
            if len(document) > prompt_tokens:
                yield Prompt(tuple(document[:prompt_tokens]), tuple(document[prompt_tokens:]))
            continue
        edges = np.flatnonzero(np.diff(np.concatenate([[False], counted_T, [False]]).astype(np.int8)))
        for first, past in zip(edges[::2], edges[1::2], strict=True):  # positions that predict one turn's tokens
            yield Prompt(tuple(document[: first + 1]), tuple(document[first + 1 : past + 1]))


def of_corpus(split: CorpusSplit, count: int, longest: int, prompt_tokens: int, seed: int) -> list[Prompt]:
    """`count` prompts of at most `longest` tokens, row by row in seeded orders, as often over as it takes.

    Raises PreflightError where the split has none.
    """

    def epoch(order: NDArray[np.int64]) -> Iterator[Prompt]:
        for row in order:
            found = in_row(split.tokens_RT[row], split.flags_RT[row], prompt_tokens)
            yield from (prompt for prompt in found if len(prompt.ids) <= longest)

    return _repeated(lambda generator: epoch(generator.permutation(len(split))), count, seed, "the corpus", longest)


def of_records(records: Sequence[Prompt], count: int, longest: int, seed: int, source: str) -> list[Prompt]:
    """`count` of the records' prompts of at most `longest` tokens, in seeded orders, as often over as it takes."""
    fitting = [prompt for prompt in records if 0 < len(prompt.ids) <= longest]

    def epoch(generator: np.random.Generator) -> Iterator[Prompt]:
        return (fitting[place] for place in generator.permutation(len(fitting)))

    return _repeated(epoch, count, seed, source, longest)


def _repeated(
    epoch: Callable[[np.random.Generator], Iterator[Prompt]], count: int, seed: int, source: str, longest: int
) -> list[Prompt]:
    generator = np.random.default_rng(seed % 2**63)
    found: list[Prompt] = []
    while len(found) < count:
        more = list(islice(epoch(generator), count - len(found)))
        if not more:
            raise PreflightError(
                f"{source} has no prompt of at most {longest} tokens",
                why="a prompt is what comes before an assistant's turn, or the beginning of a text longer than that",
                fix="raise `max_prompt_tokens`, lower `prompt_tokens`, or give the stage other `prompts`",
            )
        found += more
    return found


def read(source: Source, path: Path, tokenizer: Any, work: Path) -> list[Prompt]:
    """Every record's prompt: a text's own tokens, or a conversation up to where the assistant speaks next.

    Raises PreflightError naming the record that cannot be used.
    """
    from lmdistill.corpus.load import load
    from lmdistill.corpus.render import UnrenderableError, clean, prompt_text

    chat = source.messages is not None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.encode_special_tokens = not chat  # in text they are text: no record can forge a turn
    prompts = []
    for number, value in enumerate(load(source, path, work)[source.field], 1):
        try:
            text = prompt_text(tokenizer, clean(value)) if chat else str(value or "")
        except UnrenderableError as error:
            raise PreflightError(
                f"{source.source}, record {number}: field '{source.field}' {error}", fix="correct or remove the record"
            ) from error
        prompts.append(Prompt(tuple(backend.encode(text, add_special_tokens=False).ids)))
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 over prompts and answers in their order."""
    sha = hashlib.sha256()
    for prompt in prompts:
        for ids in (prompt.ids, prompt.answer):
            sha.update(np.asarray([len(ids), *ids], dtype="<u4").tobytes())
    return sha.hexdigest()
