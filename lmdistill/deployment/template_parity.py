"""Proof that the chat template embedded in a GGUF renders what the checkpoint's renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.deployment.golden import Conversation
from lmdistill.deployment.tokenizer_parity import GgufVocabulary
from lmdistill.errors import IntegrityError


def embedded_formatter(gguf_path: Path, *, add_generation_prompt: bool) -> Any:
    """llama-cpp-python's renderer for the template in a file; None where the file has no template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    with GgufVocabulary(gguf_path) as vocabulary:
        template, ids = vocabulary.chat_template, vocabulary.special_ids
        bos, eos = vocabulary.token_text(ids["bos"]), vocabulary.token_text(ids["eos"])
    if template is None:
        return None
    return Jinja2ChatFormatter(template, eos, bos, add_generation_prompt=add_generation_prompt)


def differing_renderings(tokenizer: Any, gguf_path: Path, conversations: list[Conversation]) -> int:
    """How many conversations (each with and without a generation prompt) transformers and llama.cpp render unlike.

    Raises IntegrityError where only one side has a template.
    """
    differing = 0
    for prompt in (False, True):
        formatter = embedded_formatter(gguf_path, add_generation_prompt=prompt)
        if (formatter is None) != (not tokenizer.chat_template):
            raise IntegrityError(f"{gguf_path.name} and the checkpoint do not both have a chat template")
        for messages in conversations:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            differing += formatter(messages=messages).prompt != rendered
    return differing
