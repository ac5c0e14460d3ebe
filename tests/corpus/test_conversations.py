"""Assistant-only masks over several turns, with and without `{% generation %}`, and templates that cannot be masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import CHATML, make_tokenizer

from lmdistill.checkpoints import load_tokenizer
from lmdistill.corpus.format import LOSS, PAD, CorpusReader
from lmdistill.errors import PreflightError

Make = Callable[..., CorpusReader]
Write = Callable[..., str]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "It is 3 🙂."},
    {"role": "user", "content": "And 你好?"},
    {"role": "assistant", "content": "\n  A greeting."},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = CHATML.replace("message['content']", "(message['content'] if loop.last else '…')")


def targets_of(reader: CorpusReader) -> str:
    """The text of all targets, in order, one row after the other."""
    split = reader.split("train")
    tokenizer = load_tokenizer(reader.tokenizer_folder)
    parts = []
    for tokens_T, flags_T in zip(split.tokens_RT, split.flags_RT, strict=True):
        parts.append(tokenizer.decode(tokens_T[1:][(flags_T[:-1] & LOSS) != 0].tolist()))
    return "".join(parts)


@pytest.fixture
def chat(write: Write) -> dict[str, Any]:
    return {"source": write([{"messages": TURNS}]), "messages": "messages"}


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
@pytest.mark.parametrize("packing", ["concat", "single"])
def test_the_targets_are_what_the_assistant_says(
    make: Make, chat: dict[str, Any], tmp_path: Path, template: str, packing: str
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template)
    reader = make(sources=[chat], tokenizer=tokenizer, sequence_length=256, packing=packing)
    assert targets_of(reader) == "It is 3 🙂.<|im_end|>\n  A greeting.<|im_end|>"
    expected = sum(len(turn["content"].encode()) for turn in TURNS if turn["role"] == "assistant")
    assert reader.meta.splits["train"].target_bytes == expected, "special tokens have no bytes"


def test_the_row_is_what_the_template_renders(make: Make, chat: dict[str, Any], tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    split = make(sources=[chat], sequence_length=256).split("train")
    keep = (split.flags_RT[0] & PAD) == 0
    assert split.tokens_RT[0][keep].tolist() == tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert np.count_nonzero(split.tokens_RT[0][keep] == tokenizer.convert_tokens_to_ids("<|im_end|>")) == len(TURNS)


def test_every_token_can_be_a_target(make: Make, chat: dict[str, Any]) -> None:
    reader = make(sources=[chat], sequence_length=256, assistant_only=False)
    assert reader.meta.splits["train"].targets == reader.meta.splits["train"].tokens - 1


def test_columns_that_other_records_have_do_not_reach_the_template(make: Make, write: Write) -> None:
    """A columnar file gives every message the fields of all: null ones are not passed on."""
    named = [{"role": "user", "name": "Ann", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hu"}]
    path = write([{"messages": named}, {"messages": plain}])
    assert "Hu" in targets_of(make(sources=[{"source": path, "messages": "messages"}], sequence_length=64))


def test_a_template_that_rewrites_earlier_turns_is_refused(make: Make, chat: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", FORGETFUL)
    with pytest.raises(PreflightError, match=r"record 1.*renders differently"):
        make(sources=[chat], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("record", "why"),
    [([], "non-empty"), ([{"role": "user"}], "without `role` and `content`"), ("text", "non-empty list")],
)
def test_a_record_that_is_no_conversation_is_named(make: Make, write: Write, record: Any, why: str) -> None:
    path = write([{"m": record}])
    with pytest.raises(PreflightError, match=f"record 1.*{why}"):
        make(sources=[{"source": path, "messages": "m"}])


def test_a_conversation_without_the_assistant_is_left_out(make: Make, write: Write) -> None:
    path = write([{"messages": TURNS[:2]}, {"messages": TURNS}])
    reader = make(sources=[{"source": path, "messages": "messages"}], sequence_length=256)
    assert reader.meta.splits["train"].documents == 1
