"""Tokens that data name by their text, or as `token_id:N`, back to ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.corpus.tokenizers import is_byte_level, read_tokenizer_json
from lmdistill.errors import PreflightError
from lmdistill.teachers.token_maps import SHOWN

ID_PREFIX = "token_id:"


class TokenNames:
    """The ids of one tokenizer by the text that a server prints for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_text: dict[str, list[int]] | None = None
        self._unknown: dict[str, str] = {}  # name → what is wrong with it

    def ids(self, names: list[Any], place: str) -> list[int]:
        """The id of each name; raises PreflightError listing those that are no token, or several."""
        found = [self._id(name) for name in names]
        if self._unknown:
            listed = "; ".join(f"{name!r} {why}" for name, why in list(self._unknown.items())[:SHOWN])
            raise PreflightError(
                f"{place}: {len(self._unknown)} token names do not fit the tokenizer in {self._folder}",
                why=listed + ("; …" if len(self._unknown) > SHOWN else ""),
                fix="give the teacher's own tokenizer; or capture with ids in place of texts (`token_id:…`, which vLLM "
                "writes with return_tokens_as_token_ids)",
            )
        return found

    def _id(self, name: Any) -> int:
        text = str(name)
        if text.startswith(ID_PREFIX) and text[len(ID_PREFIX) :].isdigit():
            return int(text[len(ID_PREFIX) :])
        ids = self._table().get(text, [])
        if len(ids) != 1:
            self._unknown[text] = f"is any of the tokens {ids}" if ids else "is no token of it"
            return -1
        return ids[0]

    def _table(self) -> dict[str, list[int]]:
        if self._by_text is None:
            from tokenizers import Tokenizer

            backend = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
            bytewise = is_byte_level(read_tokenizer_json(self._folder))
            self._by_text = {}
            for spelled, index in backend.get_vocab().items():
                text = backend.decode([index], skip_special_tokens=False) if bytewise else spelled.replace("▁", " ")
                self._by_text.setdefault(text, []).append(index)
        return self._by_text
