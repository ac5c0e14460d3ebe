"""What a corpus must know of a tokenizer: digests, the bytes of each token, the separator, the chat template."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import ModelRef, Planned

ID_SECTIONS = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # what decides which ids a text gets
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """tokenizer.json of a model or tokenizer folder; PreflightError where there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise PreflightError(f"{folder} has no tokenizer.json", why="only fast tokenizers are read")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the parts of tokenizer.json that decide ids; two tokenizers with equal digests give equal ids."""
    content = read_tokenizer_json(folder)
    deciding = {name: content.get(name) for name in ID_SECTIONS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def chat_template(folder: Path) -> str | None:
    """The folder's chat template: chat_template.jinja, else the entry of tokenizer_config.json; None without one."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        return file.read_text()
    found = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    if isinstance(found, list):  # older files name several
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def chat_template_digest(folder: Path) -> str | None:
    """sha256 of the chat template's text; None without one."""
    template = chat_template(folder)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def special_tokens(content: dict[str, Any]) -> list[str]:
    """The special tokens of a tokenizer.json."""
    return [added["content"] for added in content.get("added_tokens", []) if added["special"]]


def planned_tokenizer(corpus: Planned, teacher: ModelRef | None) -> Path | None:
    """The folder of the tokenizer that a planned corpus has or will have; None while it is not on this machine."""
    if corpus.artefact is not None:
        return corpus.artefact.out / "tokenizer"
    spec = getattr(corpus.config, "tokenizer", None)
    if spec is None:
        return None if teacher is None else teacher.path
    from lmdistill.assets import available

    folder = available(spec)
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None


def token_bytes(folder: Path) -> NDArray[np.uint32]:
    """Bytes of text that each id stands for, [V]; special tokens stand for none.

    Byte-level tokenizers spell one byte a character; others spell a space as `▁` and stray bytes as `<0xNN>`.
    """
    content = read_tokenizer_json(folder)
    vocabulary = content["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t, i) for i, (t, _) in enumerate(vocabulary))
    lengths = (
        {index: len(token) for token, index in pairs}
        if is_byte_level(content)
        else {
            index: 1 if BYTE_TOKEN.fullmatch(token) else len(token.replace("▁", " ").encode()) for token, index in pairs
        }
    )
    for added in content.get("added_tokens", []):
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    table = np.zeros(max(lengths) + 1, dtype=np.uint32)
    table[list(lengths)] = list(lengths.values())
    return table


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json spells one byte a character."""
    return '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])


def separator_id(tokenizer: Any, separator: str) -> int | None:
    """The id that `separator` names: eos, bos, none, or a token; PreflightError where the tokenizer lacks it."""
    if separator == "none":
        return None
    named = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    found = named[separator] if separator in named else tokenizer.get_vocab().get(separator)
    if found is None:
        specials = ", ".join(sorted(map(str, tokenizer.all_special_tokens))[:10])
        raise PreflightError(
            f"the tokenizer has no separator '{separator}'",
            why=f"its special tokens are {specials or 'none'}",
            fix="set `separator:` to one of its tokens, or to none",
        )
    return int(found)


def declares(folder: Path, separator: str) -> bool:
    """Whether the tokenizer's files alone, read without transformers, show that it has this separator."""
    if separator == "none":
        return True
    content, config = read_tokenizer_json(folder), folder / "tokenizer_config.json"
    token: Any = separator
    if separator in ("eos", "bos"):
        token = json.loads(config.read_text()).get(f"{separator}_token") if config.exists() else None
        token = token["content"] if isinstance(token, dict) else token
    known = {added["content"] for added in content.get("added_tokens", [])}
    vocabulary = content["model"]["vocab"]
    return token in known or (isinstance(vocabulary, dict) and token in vocabulary)


def pad_id(tokenizer: Any) -> int:
    """What padding is filled with: the tokenizer's own, else its EOS, else 0; flags say what is padding."""
    chosen = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next((int(index) for index in chosen if index is not None), 0)
