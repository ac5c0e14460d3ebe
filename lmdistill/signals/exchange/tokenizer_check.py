"""Whether data was tokenised with the tokenizer that is named for it, as far as the data tells."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from lmdistill.corpus.tokenizers import read_tokenizer_json, special_tokens
from lmdistill.errors import PreflightError
from lmdistill.teachers.token_maps import SHOWN, check_same_tokens, real_vocabulary, token_map

TEXTS = 16  # records whose text is tokenised again
FIX = "give the teacher's own tokenizer with --tokenizer"


def check_tokenizer(source: Path, data: Any, folder: Path) -> int:
    """The tokenizer's vocabulary; raises PreflightError listing the tokens in which the data contradicts it."""
    tokens = token_map(folder)
    vocabulary = real_vocabulary(tokens)
    if data.vocab_size is not None and data.vocab_size < vocabulary:
        raise PreflightError(
            f"{source} was captured for a vocabulary of {data.vocab_size}, the tokenizer has {vocabulary} tokens",
            why=f"its first token beyond is {tokens[data.vocab_size]!r}" if data.vocab_size in tokens else "",
            fix=FIX,
        )
    beside = source if source.is_dir() else source.parent
    if (beside / "tokenizer.json").is_file():
        check_same_tokens(token_map(beside), tokens, "the data's tokenizer", "--tokenizer", FIX)
    _check_texts(data, folder, tokens)
    return vocabulary


def _check_texts(data: Any, folder: Path, tokens: dict[int, str]) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = special_tokens(read_tokenizer_json(folder))
    special = {number for number, token in tokens.items() if token in named}
    for place, ids_L, text in islice(data.texts(), TEXTS):
        theirs = [number for number in ids_L.tolist() if number not in special]
        ours = [number for number in backend.encode(text, add_special_tokens=False).ids if number not in special]
        wrong = [pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]]
        if wrong:
            listed = ", ".join(f"{a}: {tokens.get(a)!r} / {tokens.get(b)!r} ({b})" for a, b in wrong[:SHOWN])
            raise PreflightError(
                f"{place}: tokens and text contradict the tokenizer in {folder}: {len(wrong)} tokens differ",
                why=f"the data's id, what it stands for / what the text has there: {listed}",
                fix=FIX,
            )
