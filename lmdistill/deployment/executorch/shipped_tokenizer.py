"""The tokenizer beside a `.pte`, as a program without transformers reads it, and proof that it is the checkpoint's."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import IntegrityError, LmdistillError

if TYPE_CHECKING:
    from lmdistill.corpus.format import CorpusReader

Message = dict[str, str]
_PROBE = "lmdistill"


class ShippedTokenizer:
    """The tokenizer and chat template in a folder, with the `tokenizers` package alone."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            raise LmdistillError(
                f"no tokenizer in {folder}", fix="keep the folder `tokenizer` that the export wrote beside its files"
            )
        self.folder = folder
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are read as such; nothing is put around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._tokenizer.decode(ids)
        return text

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer: the end of text, and the special token that the template puts after a turn."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        turn = self.render(messages, add_generation_prompt=False)
        tail = turn[turn.rindex(_PROBE) + len(_PROBE) :]
        special = set(self._tokenizer.get_added_tokens_decoder())
        after = next((token for token in self.encode(tail) if token in special), None)
        found = {after, self._tokenizer.token_to_id(self._special("eos_token"))}
        return frozenset(token for token in found if token is not None)

    def _special(self, name: str) -> str:
        value = self._config.get(name)
        return str(value.get("content", "") if isinstance(value, dict) else value or "")

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """A conversation in the model's chat template; raises LmdistillError where there is none."""
        path = self.folder / "chat_template.jinja"
        template = path.read_text("utf-8") if path.exists() else self._config.get("chat_template")
        if not template:
            raise LmdistillError(f"{self.folder} has no chat template", fix="export a model whose tokenizer has one")
        text: str = (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._special("bos_token"),
                eos_token=self._special("eos_token"),
            )
        )
        return text


def _environment() -> Any:
    """Jinja as chat templates are written for."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    return environment


def prove_shipped(model: Path, shipped: Path, conversations: int, corpus: CorpusReader | None) -> dict[str, Any]:
    """Compare the shipped tokenizer's ids and renderings with transformers' of the checkpoint; the counts.

    Raises IntegrityError that names what differs.
    """
    from lmdistill.checkpoints import load_tokenizer
    from lmdistill.deployment.golden import accepted_conversations
    from lmdistill.deployment.probes import probe_texts

    theirs, ours = load_tokenizer(model), ShippedTokenizer(shipped)
    texts, golden = probe_texts(), accepted_conversations(theirs, conversations)
    for text in texts:
        if ours.encode(text) != theirs.encode(text, add_special_tokens=False):
            raise IntegrityError("the shipped tokenizer gives other ids than the checkpoint's", why=f"for {text!r}")
    for messages in golden:
        for prompt in (False, True):
            rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            if ours.render(messages, add_generation_prompt=prompt) != rendered:
                raise IntegrityError("the shipped chat template renders otherwise than the checkpoint's")
    proof = {"texts": len(texts), "conversations": len(golden), "differing": 0}
    return proof if corpus is None else proof | {"training_documents": _prove_training_ids(ours, theirs, corpus)}


def _prove_training_ids(ours: ShippedTokenizer, theirs: Any, corpus: CorpusReader) -> int:
    """Tokenise documents of the held-out split again; how many there were."""
    from lmdistill.deployment.tokenizer_proof import DOCUMENTS, whole_documents

    documents = list(whole_documents(corpus, DOCUMENTS))
    for ids in documents:
        text = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if ours.encode(text) != ids:
            raise IntegrityError(
                "the shipped tokenizer gives a training document other ids than the corpus has",
                why=f"the document begins {text[:60]!r}",
                fix="run the corpus stage again with the model's tokenizer",
            )
    return len(documents)
