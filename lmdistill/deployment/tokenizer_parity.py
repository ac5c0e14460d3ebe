"""Proof that a model folder's tokenizer gives the ids that llama.cpp's gives for a GGUF, and that token maps agree."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime, take_log
from lmdistill.errors import AssetError, IntegrityError

Conversation = Sequence[dict[str, Any]]
SHOWN = 5  # differing texts named in a message


@dataclass(frozen=True)
class Difference:
    """One text with other ids: `position` is the first that differs; an id is None where one side has ended."""

    text: str
    position: int
    hf_id: int | None
    gguf_id: int | None
    parsed_special: bool  # whether special tokens in the text were read as such

    def __str__(self) -> str:
        """The text, cut to 60 characters, and the first differing ids."""
        shown = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return f"{shown!r} at token {self.position}: {self.hf_id} where llama.cpp has {self.gguf_id}"


@dataclass(frozen=True)
class ParityResult:
    """What a comparison found."""

    checked: int  # texts and conversations compared
    differences: tuple[Difference, ...] = field(default=())
    settings: tuple[str, ...] = field(default=())  # special-token settings that differ, in words

    @property
    def equal(self) -> bool:
        """Whether every text got the same ids and the settings agree."""
        return not self.differences and not self.settings

    def require(self, what: str) -> None:
        """Raise IntegrityError naming the first differing texts, unless all is equal."""
        if self.equal:
            return
        named = [str(difference) for difference in self.differences[:SHOWN]] + list(self.settings)
        raise IntegrityError(
            f"{what}: {len(self.differences)} of {self.checked} texts get other token ids than in llama.cpp",
            why="; ".join(named),
            fix="use a tokenizer that agrees: the model's own repository, or a GGUF made from this very folder",
        )


def compare(
    hf_folder: Path, gguf_path: Path, texts: Iterable[str], conversations: Iterable[Conversation] = ()
) -> ParityResult:
    """Compare ids of transformers' tokenizer in `hf_folder` with llama.cpp's for `gguf_path`.

    Each text is compared twice: with special tokens in it read as special, and read as plain text (as corpora are
    tokenised); conversations are rendered by the folder's chat template. BOS and EOS settings are compared too.
    """
    from lmdistill.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(hf_folder)
    texts = list(texts)
    rendered = [tokenizer.apply_chat_template(list(turns), tokenize=False) for turns in conversations]
    readings = [(text, special) for text in texts for special in (False, True)] + [(text, True) for text in rendered]
    llama = GgufVocabulary(gguf_path)
    with llama:
        found = (_difference(tokenizer, llama, text, special) for text, special in readings)
        differences = tuple(difference for difference in found if difference is not None)
        settings = tuple(_settings(tokenizer, llama))
    return ParityResult(len(texts) + len(rendered), differences, settings)


class GgufVocabulary(LlamaCppRuntime):
    """llama.cpp's tokenizer of a GGUF, with no weights loaded; AssetError where llama.cpp refuses the file."""

    def _open(self, exact: bool) -> None:
        parameters = self._lib.llama_model_default_params()
        parameters.vocab_only = True
        take_log()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not self._model:
            why = "; ".join(line for line in take_log() if line)
            raise AssetError(f"llama.cpp cannot read the tokenizer of {self.path}", why=why)
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    @property
    def add_bos(self) -> bool:
        """Whether BOS goes before a text."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def add_eos(self) -> bool:
        """Whether EOS goes after a text."""
        return bool(self._lib.llama_vocab_get_add_eos(self._vocab))


def _difference(tokenizer: Any, llama: GgufVocabulary, text: str, special: bool) -> Difference | None:
    tokenizer.backend_tokenizer.encode_special_tokens = not special
    hf_ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    gguf_ids: list[int] = llama.tokenize(text, parse_special=special)
    if hf_ids == gguf_ids:
        return None
    both = min(len(hf_ids), len(gguf_ids))
    first = next((i for i in range(both) if hf_ids[i] != gguf_ids[i]), both)
    return Difference(text, first, _at(hf_ids, first), _at(gguf_ids, first), special)


def _at(ids: list[int], index: int) -> int | None:
    return ids[index] if index < len(ids) else None


def _settings(tokenizer: Any, llama: GgufVocabulary) -> list[str]:
    """Differences in what is put around a text and in which token ends one."""
    found = []
    tokenizer.backend_tokenizer.encode_special_tokens = False
    hf_ids = tokenizer("x")["input_ids"]
    gguf_ids = llama.tokenize("x", add_special=True)
    if hf_ids != gguf_ids:
        found.append(f"the text 'x' with BOS is {hf_ids}, in llama.cpp {gguf_ids}")
    if tokenizer.eos_token_id != llama.special_ids["eos"]:
        found.append(f"EOS is {tokenizer.eos_token_id}, in llama.cpp {llama.special_ids['eos']}")
    return found
