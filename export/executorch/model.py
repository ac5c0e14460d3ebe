"""A `.pte` that answers conversations, with the tokenizer and chat template that lie beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from lmdistill.deployment.executorch.generation import generate
from lmdistill.deployment.executorch.runtime import ExecutorchRuntime
from lmdistill.deployment.executorch.shipped_tokenizer import ShippedTokenizer
from lmdistill.deployment.runner import Message, Sampling
from lmdistill.errors import LmdistillError

PRESETS = Path(__file__).parent / "presets"


class Preset(Sampling):
    """Keys of a preset: all must be there, others are refused."""

    threads: int | None = Field(ge=1)
    max_tokens: int = Field(ge=1)
    system: str | None


class ChatModel:
    """A program that answers conversations; raises LmdistillError where it cannot."""

    def __init__(self, path: Path, tokenizer: Path | None, preset: Preset) -> None:
        self._runtime = ExecutorchRuntime(path, n_threads=preset.threads)
        self._tokenizer = ShippedTokenizer(tokenizer or path.parent / "tokenizer")
        self._preset = preset

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """An answer, piece by piece."""
        if self._preset.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._preset.system}, *messages]
        prompt = self._tokenizer.encode(self._tokenizer.render(messages, add_generation_prompt=True))
        if len(prompt) >= self._runtime.context:
            raise LmdistillError(
                f"the conversation has {len(prompt)} tokens, the file holds {self._runtime.context}",
                fix="begin a new one, or export with a larger `context`",
            )
        ids: list[int] = []
        said = text = ""
        limit, ends = self._preset.max_tokens, self._tokenizer.ends
        for token in generate(self._runtime, prompt, self._preset, ends, limit):
            ids.append(token)
            text = self._tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character of several tokens that is not whole yet
                yield text[len(said) :]
                said = text
        yield text[len(said) :]
