"""Proof that the chat template embedded in a GGUF renders what the checkpoint's renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.deployment.golden import Conversation
from lmdistill.deployment.tokenizer_parity import open_vocabulary
from lmdistill.errors import IntegrityError


def embedded_formatter(gguf_path: Path, *, add_generation_prompt: bool) -> Any:
    """llama-cpp-python's renderer for the template in a file; None where the file has no template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = open_vocabulary(gguf_path)
    template = llama.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    bos, eos = (_token_text(llama, token) for token in (llama.token_bos(), llama.token_eos()))
    return Jinja2ChatFormatter(template, eos, bos, add_generation_prompt=add_generation_prompt)


def _token_text(llama: Any, token: int) -> str:
    return "" if token < 0 else str(llama.detokenize([token], special=True).decode("utf-8"))


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
