"""Pre-tokenizers by their llama.cpp name (`tokenizer.ggml.pre`), as `tokenizers` objects that split alike.

Every entry is proven by tests against llama.cpp itself. A name that is not here is refused: a near miss gives
other ids for a few texts in a hundred, which nothing downstream would notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmdistill.errors import AssetError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORDS_AND_BREAKS = r"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenization:
    """How text is cut before byte-pair merges."""

    regex: str | None  # None: GPT-2's own pattern
    single_digits: bool = False  # every digit stands alone
    ignore_merges: bool = False  # a piece that is a whole token is taken as it is


def _tiktoken(digits: str, *, ignore_merges: bool = False) -> PreTokenization:
    words = WORDS_AND_BREAKS.format(digits=digits)
    return PreTokenization("|".join((CONTRACTIONS, words, SPACES)), ignore_merges=ignore_merges)


GPT2 = PreTokenization(None)
SINGLE_DIGITS = PreTokenization(None, single_digits=True)
LLAMA3 = _tiktoken("{1,3}", ignore_merges=True)
QWEN2 = _tiktoken("")

KNOWN: dict[str, PreTokenization] = {
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "smollm": SINGLE_DIGITS,
    "starcoder": SINGLE_DIGITS,
    "refact": SINGLE_DIGITS,
    "command-r": SINGLE_DIGITS,
    "codeshell": SINGLE_DIGITS,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "lfm2": LLAMA3,
    "falcon3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "stablelm2": QWEN2,
}


def find(name: str) -> PreTokenization:
    """The entry for llama.cpp's `name`; raises AssetError listing the known ones."""
    if name in KNOWN:
        return KNOWN[name]
    raise AssetError(
        f"the GGUF's pre-tokenizer '{name}' is not known",
        why=f"known are {', '.join(sorted(KNOWN))}",
        fix="use the model's Hugging Face repository as the teacher instead: `hf:org/name@revision`",
    )


def build(entry: PreTokenization) -> PreTokenizer:
    """The `tokenizers` pre-tokenizer that splits as `entry` says and maps bytes to characters."""
    from tokenizers import Regex, pre_tokenizers

    if entry.regex is not None:
        split = pre_tokenizers.Split(Regex(entry.regex), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if entry.single_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    return level
