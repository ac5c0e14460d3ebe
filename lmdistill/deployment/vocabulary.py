"""A tokenizer folder as llama.cpp wants it: tokens, kinds, merges, special ids, pre-tokenizer, chat template.

llama.cpp knows a byte-level BPE's pre-tokenizer only by name. The name comes from `tokenizer.gguf.json` where the
folder has one, else from the structure of tokenizer.json; a structure without a name is refused, because a near
miss gives other ids for a few texts and nothing downstream would notice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.deployment.pretokenizers import CONTRACTIONS, KNOWN, PreTokenization
from lmdistill.errors import PreflightError

PRE_TOKENIZER_FILE = "tokenizer.gguf.json"  # {"pre": name}
_CASELESS_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # how most tokenizer.json files write CONTRACTIONS
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_PROBE = "lmdistill"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special_ids: dict[str, int]  # bos, eos, unk, pad, eot: those that exist
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def add_to(self, writer: Any) -> None:
        """Write it all through a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, token in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def refuse(path: Path, why: str) -> PreflightError:
    """The error for a tokenizer that llama.cpp cannot be told about."""
    fix = "take a teacher with a byte-level BPE tokenizer that llama.cpp knows, or drop the export stage"
    return PreflightError(f"the tokenizer in {path} cannot be written into a GGUF", why=why, fix=fix)


def check_tokenizer(folder: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of the tokenizer in `folder`.

    Needs no heavy import. Raises PreflightError where the tokenizer is of a kind that llama.cpp, or this writer,
    does not have.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise refuse(folder, "tokenizer.json is missing")
    tokenizer: dict[str, Any] = json.loads(path.read_text("utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = f"{model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
        raise refuse(folder, f"its model is {kind}, only byte-level BPE is written")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # llama.cpp takes text to be NFC already
        raise refuse(folder, f"it normalises text ({normalizer.get('type')}), llama.cpp does not")
    for token in tokenizer.get("added_tokens", ()):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise refuse(folder, f"its token {token['content']!r} swallows spaces around it, llama.cpp's does not")
    return _pre_tokenizer_name(folder, tokenizer)


def _pre_tokenizer_name(folder: Path, tokenizer: dict[str, Any]) -> str:
    recorded = folder / PRE_TOKENIZER_FILE
    if recorded.is_file():
        return str(json.loads(recorded.read_text("utf-8"))["pre"])
    found = _structure(tokenizer.get("pre_tokenizer") or {}, bool(tokenizer["model"].get("ignore_merges")))
    name = next((name for name, entry in KNOWN.items() if entry == found), None)
    if name is None:
        raise refuse(folder, f"its pre-tokenizer has no known name in llama.cpp: {tokenizer.get('pre_tokenizer')}")
    return name


def _structure(pre_tokenizer: dict[str, Any], ignore_merges: bool) -> PreTokenization | None:
    """The table's entry that a tokenizer.json's pre_tokenizer amounts to; None where it is none of its forms."""
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before, gpt2_pattern = steps[:-1], steps[-1].get("use_regex", True)
    if not before and gpt2_pattern:
        return PreTokenization(None, ignore_merges=ignore_merges)
    if len(before) != 1:
        return None
    step = before[0]
    if step.get("type") == "Digits" and step.get("individual_digits") and gpt2_pattern:
        return PreTokenization(None, single_digits=True, ignore_merges=ignore_merges)
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    if step.get("type") == "Split" and isolated and not gpt2_pattern and "Regex" in step["pattern"]:
        regex = step["pattern"]["Regex"].replace(_CASELESS_CONTRACTIONS, CONTRACTIONS)
        return PreTokenization(regex, ignore_merges=ignore_merges)
    return None


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer in `folder`, filled with unused tokens up to the model's `vocab_size`.

    Raises PreflightError where it has no counterpart in llama.cpp or has more tokens than the model has rows.
    """
    from lmdistill.checkpoints import load_tokenizer

    pre = check_tokenizer(folder)
    raw: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    texts = {id_: text for text, id_ in raw["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, _NORMAL)
    for added in raw.get("added_tokens", ()):
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if max(texts) >= vocab_size:
        raise refuse(folder, f"it has ids up to {max(texts)}, the model's vocabulary is {vocab_size}")
    if len(set(texts.values())) < len(texts):  # llama.cpp would abort the process
        raise refuse(folder, "two of its ids stand for the same text")
    tokenizer = load_tokenizer(folder)
    plain, full = tokenizer.encode(_PROBE, add_special_tokens=False), tokenizer.encode(_PROBE)
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    template = tokenizer.chat_template
    return Vocabulary(
        pre=pre,
        tokens=[texts.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        kinds=[kinds.get(i, _UNUSED) for i in range(vocab_size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]],
        special_ids=_special_ids(tokenizer),
        add_bos=at > 0,
        add_eos=at + len(plain) < len(full),
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _special_ids(tokenizer: Any) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    ids["eot"] = turn_end(tokenizer)
    return {name: int(token) for name, token in ids.items() if token is not None}


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an assistant's words: where generation must stop."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    tail = text[text.rindex(_PROBE) + len(_PROBE) :]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tokenizer.encode(tail, add_special_tokens=False) if token in special), None)
