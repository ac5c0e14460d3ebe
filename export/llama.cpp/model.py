"""What chat.py and serve.py share: presets, and a GGUF opened with the chat template that is embedded in it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from lmdistill.deployment.llama_cpp_runtime import default_threads, llama_library
from lmdistill.deployment.runner import Message, Sampling
from lmdistill.deployment.template_parity import embedded_formatter
from lmdistill.errors import LmdistillError

PRESETS = Path(__file__).parent / "presets"


class Preset(Sampling):
    """Keys of a preset: all must be there, others are refused."""

    context: int = Field(ge=16)
    threads: int | None = Field(ge=1)
    batch: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    system: str | None

    def sampling(self) -> dict[str, Any]:
        """The keys that decide an answer, as llama-cpp-python names them."""
        return {name: getattr(self, name) for name in ("max_tokens", *Sampling.model_fields)}


class ChatModel:
    """A GGUF that answers conversations; raises LmdistillError where it cannot."""

    def __init__(self, path: Path, preset: Preset) -> None:
        if not path.is_file():
            raise LmdistillError(f"no such file: {path}")
        llama_cpp = llama_library()
        self.path, self.preset = path, preset
        self._formatter = embedded_formatter(path, add_generation_prompt=True)
        if self._formatter is None:
            raise LmdistillError(f"{path} has no chat template", fix="export a model whose tokenizer has one")
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=preset.context,
            n_batch=min(preset.batch, preset.context),
            n_threads=preset.threads or default_threads(),
            n_threads_batch=preset.threads or default_threads(),
            chat_format="chat_template.default",  # the file's own; the default is to guess a similar one by name
            verbose=False,
        )
        trained = llama_cpp.llama_model_n_ctx_train(self._llama.model)
        if preset.context > trained:
            raise LmdistillError(f"context {preset.context} is longer than the {trained} tokens this model knows")

    def messages(self, messages: list[Message]) -> list[Message]:
        """The conversation with the preset's system prompt in front, where it has none of its own."""
        if self.preset.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.preset.system}, *messages]
        return messages

    def count(self, messages: list[Message]) -> int:
        """Tokens of the rendered conversation; raises LmdistillError where no room for an answer is left."""
        prompt = self._formatter(messages=messages).prompt
        tokens = len(self._llama.tokenize(prompt.encode("utf-8"), add_bos=False, special=True))
        if tokens >= self.preset.context:
            raise LmdistillError(
                f"the conversation has {tokens} tokens, the context {self.preset.context}",
                fix="begin a new one, or raise `context` in the preset",
            )
        return tokens

    def complete(self, messages: list[Message], **keys: Any) -> Any:
        """llama-cpp-python's chat completion (OpenAI's format), with the preset's sampling under `keys`."""
        messages = self.messages(messages)
        self.count(messages)
        return self._llama.create_chat_completion(messages=messages, **(self.preset.sampling() | keys))

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """An answer, piece by piece."""
        for chunk in self.complete(messages, stream=True):
            yield chunk["choices"][0]["delta"].get("content") or ""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that chat.py and serve.py have in common."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("gguf", type=Path, help="the model file, such as runs/lfm_small/…/out/files-Q4_0.gguf")
    made.add_argument("--preset", default="laptop", help="a file in presets/ by name, or the path of a .yaml file")
    return made
