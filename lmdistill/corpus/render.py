"""Conversations as text: the tokenizer's chat template, and which characters are the assistant's.

A template with `{% generation %}` marks says itself what the assistant writes. For others the assistant's turn is
what rendering one message more adds to the prompt that asks for it; where the template rewrites earlier turns, that
has no answer, and the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnrenderableError(Exception):
    """Why a conversation cannot be rendered or masked; the caller adds which record it is."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and the character ranges [start, stop) that the assistant writes."""

    text: str
    spans: tuple[tuple[int, int], ...]


def marks_generation(template: str) -> bool:
    """Whether the template marks the assistant's part itself."""
    return GENERATION_MARK.search(template) is not None


def clean(messages: Any) -> list[Message]:
    """`messages` without the null entries that columnar formats add; UnrenderableError where it is no conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UnrenderableError("is not a non-empty list of messages")
    found = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") is None or message.get("content") is None:
            raise UnrenderableError("has a message without `role` and `content`")
        found.append({name: value for name, value in message.items() if value is not None})
    return found


def render(tokenizer: Any, messages: list[Message], with_spans: bool = True) -> Rendered:
    """Text and, unless they are not wanted, the assistant's ranges; UnrenderableError where these cannot be told."""
    if not with_spans:
        return Rendered(_text(tokenizer, messages), ())
    if marks_generation(tokenizer.get_chat_template()):
        return _by_marks(tokenizer, messages)
    text = _text(tokenizer, messages)
    specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _text(tokenizer, messages[:index], add_generation_prompt=True)
        turn = _text(tokenizer, messages[: index + 1])
        if not (text.startswith(turn) and turn.startswith(prompt)):
            raise UnrenderableError(
                f"has an assistant's turn ({index + 1} of {len(messages)}) that the chat template renders differently "
                "with the turns before or after it, so its place is not known"
            )
        spans.append((len(prompt), _end_of_turn(turn, specials)))
    return Rendered(text, tuple(spans))


def prompt_text(tokenizer: Any, messages: list[Message]) -> str:
    """The conversation up to where the assistant speaks next; a last turn of the assistant's own is dropped."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise UnrenderableError("has nothing but an assistant's turn")
    return _text(tokenizer, asked, add_generation_prompt=True)


def _end_of_turn(turn: str, specials: tuple[str, ...]) -> int:
    """Where the assistant's part ends: generation stops at the closing token, white space after it is never written."""
    bare = turn.rstrip()
    return len(bare) if bare.endswith(specials) else len(turn)


def _text(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, ValueError, TypeError) as error:
        raise UnrenderableError(f"is refused by the chat template: {error}") from error


def _by_marks(tokenizer: Any, messages: list[Message]) -> Rendered:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, marked = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise UnrenderableError(f"is refused by the chat template: {error}") from error
    return Rendered(texts[0], tuple((int(start), int(stop)) for start, stop in marked[0]))
