"""Prompts from rows: what comes before a turn, nothing that a row begins in the middle of, the data's own answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.corpus.format import DOC_START, LOSS, PAD, CorpusSplit
from lmdistill.errors import PreflightError
from lmdistill.on_policy.prompts import Prompt, digest, in_row, of_corpus, of_records

TURN = st.tuples(st.booleans(), st.integers(1, 5))  # the assistant's, length
CHATS = st.lists(st.lists(TURN, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(CHATS, st.integers(0, 3))
def test_every_turn_of_the_assistant_makes_one_prompt_of_all_that_is_before_it(
    chats: list[list[tuple[bool, int]]], padding: int
) -> None:
    tokens: list[int] = []
    flags: list[int] = []
    wanted = []
    for turns in chats:
        start = len(tokens)
        turns = [
            (False, 2),
            *(turn for before, turn in zip([(False, 2), *turns], turns, strict=False) if _new(before, turn)),
        ]
        for assistants, length in turns:
            if assistants:
                wanted.append((tuple(tokens[start:]), tuple(range(len(tokens), len(tokens) + length))))
                flags[-1] |= LOSS
                flags += [LOSS] * (length - 1) + [0]
            else:
                flags += [0] * length
            tokens += range(len(tokens), len(tokens) + length)
        flags[start] |= DOC_START
    row = np.array([*tokens, *[999] * padding])
    found = list(in_row(row, np.array([*flags, *[PAD] * padding], np.uint8), 4))
    assert [(prompt.ids, prompt.answer) for prompt in found] == wanted


def _new(before: tuple[bool, int], turn: tuple[bool, int]) -> bool:
    """Two turns of the assistant in a row would be one."""
    return not (before[0] and turn[0])


def _text_split() -> CorpusSplit:
    """Row 0: a document of 9 and one of 3; row 1: the rest of some document, then one of 8."""
    tokens = np.arange(24).reshape(2, 12)
    flags = np.full(tokens.shape, LOSS, np.uint8)
    flags[0, [8, 11]], flags[1, [3, 11]] = 0, 0
    flags[[0, 0, 1], [0, 9, 4]] |= DOC_START
    return CorpusSplit("train", tokens, flags, np.ones(2, np.uint32))


def test_a_text_is_cut_after_its_first_tokens_and_a_row_that_begins_inside_one_makes_no_prompt() -> None:
    split = _text_split()
    rows = [list(in_row(split.tokens_RT[row], split.flags_RT[row], 5)) for row in range(2)]
    assert rows == [
        [Prompt((0, 1, 2, 3, 4), (5, 6, 7, 8))],
        [Prompt((16, 17, 18, 19, 20), (21, 22, 23))],
    ]


def test_the_order_is_seeded_and_goes_over_the_rows_again_in_another_order() -> None:
    found = [of_corpus(_text_split(), 12, 8, 5, seed) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert [len(set(found[0][i : i + 2])) for i in range(0, 12, 2)] == [2] * 6
    assert digest(found[0]) == digest(found[1]) != digest(found[2])


def test_prompts_that_are_too_long_are_left_out_and_none_left_is_an_error() -> None:
    with pytest.raises(PreflightError, match="no prompt of at most 4 tokens"):
        of_corpus(_text_split(), 1, 4, 5, 0)
    records = [Prompt((1,)), Prompt((1, 2, 3)), Prompt(())]
    assert set(of_records(records, 4, 2, 0, "x.jsonl")) == {Prompt((1,))}
    with pytest.raises(PreflightError, match=r"x\.jsonl has no prompt"):
        of_records(records[1:], 4, 2, 0, "x.jsonl")
