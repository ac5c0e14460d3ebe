"""Golden conversations: what a chat model is asked, in every script, with and without a system prompt.

The same conversations on every machine. They are what tokenizers and chat templates are compared on.
"""

from __future__ import annotations

import random
from typing import Any

from lmdistill.deployment.probes import probe_texts

Message = dict[str, str]
Conversation = list[Message]
_TEXTS = 600  # distinct passages: digits, scripts, emoji, code, markup, white space


def golden_conversations(count: int) -> list[Conversation]:
    """`count` conversations of one to six turns; every third has a system prompt, every other one ends on an answer."""
    chooser = random.Random(7_340_033)
    texts = probe_texts(_TEXTS)
    conversations = []
    for index in range(count):
        turns = 2 * chooser.randint(1, 3) - index % 2
        messages = [
            {"role": "assistant" if turn % 2 else "user", "content": texts[chooser.randrange(_TEXTS)]}
            for turn in range(turns)
        ]
        if index % 3 == 0:
            messages.insert(0, {"role": "system", "content": texts[chooser.randrange(_TEXTS)]})
        conversations.append(messages)
    return conversations


def accepted_conversations(tokenizer: Any, count: int) -> list[Conversation]:
    """The golden conversations that the tokenizer's chat template renders; some templates refuse system prompts."""
    from jinja2 import TemplateError

    accepted = []
    for messages in golden_conversations(count) if tokenizer.chat_template else ():
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError:
            continue
        accepted.append(messages)
    return accepted
