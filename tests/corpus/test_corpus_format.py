"""What a corpus promises on disk: flags, byte counts, digests, and refusal of what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdistill.checkpoints import load_tokenizer
from lmdistill.corpus.format import DOC_START, LOSS, PAD, CorpusReader
from lmdistill.errors import IntegrityError

TEXTS = ["The quick brown fox jumps.", "naïve café 你好 🙂", "12345", "def f(x):\n\treturn x", "over lazy dogs " * 9]
Make = Callable[..., CorpusReader]
Write = Callable[..., str]


def records(texts: list[str] = TEXTS) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


@pytest.mark.parametrize("packing", ["concat", "isolate", "single"])
@pytest.mark.parametrize("separator", ["eos", "bos", "none"])
def test_every_flag_says_what_it_means(make: Make, write: Write, packing: str, separator: str) -> None:
    reader = make(sources=[write(records())], packing=packing, separator=separator)
    split = reader.split("train")
    tokens, flags = np.asarray(split.tokens_RT), np.asarray(split.flags_RT)
    loss, starts, padding = (flags & LOSS) != 0, (flags & DOC_START) != 0, (flags & PAD) != 0
    assert not loss[:, -1].any()
    assert not (loss[:, :-1] & starts[:, 1:]).any(), "a document's first token is nobody's target"
    assert not (loss[:, :-1] & padding[:, 1:]).any()
    assert (tokens[padding] == reader.meta.pad_id).all()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is at a row's end"
    assert starts.sum() == len(TEXTS) == reader.meta.splits["train"].documents
    if packing == "single":
        assert (starts.sum(axis=1) <= 1).all() and starts.sum() == starts[:, 0].sum()
    else:
        assert not padding[:-1].any(), "rows are full but the last"
    # nothing else is left out: inside a row, everything but padding and first tokens is a target
    assert (loss[:, :-1] == ~(padding[:, 1:] | starts[:, 1:])).all()


@pytest.mark.parametrize("separator", ["eos", "bos", "none"])
def test_the_rows_hold_the_texts(make: Make, write: Write, tokenizer_folder: Path, separator: str) -> None:
    reader = make(sources=[write(records())], separator=separator)
    split = reader.split("train")
    keep = (split.flags_RT.reshape(-1) & PAD) == 0
    stream = split.tokens_RT.reshape(-1)[keep].tolist()
    tokenizer = load_tokenizer(tokenizer_folder)
    mark = {"eos": "<|endoftext|>", "bos": "<|im_start|>", "none": ""}[separator]
    text = tokenizer.decode(stream)
    pieces = sorted(filter(None, text.split(mark))) if mark else None
    assert pieces is None or pieces == sorted(TEXTS)
    assert len(text) == sum(map(len, TEXTS)) + len(mark) * len(TEXTS)


def test_bytes_are_those_of_the_targets(make: Make, write: Write) -> None:
    """In one row a text, all tokens but the first are targets; each first token here is one byte."""
    texts = ["zażółć gęślą", "q🙂🙂🙂", "x=1"]
    reader = make(sources=[write(records(texts))], packing="single", separator="bos", sequence_length=64)
    expected = {len(text.encode()) for text in texts}  # the separator is the first token and has no bytes
    assert set(reader.split("train").bytes_R.tolist()) == expected


def test_special_tokens_in_text_are_text(make: Make, write: Write) -> None:
    reader = make(sources=[write([{"text": "a <|im_end|> b"}])], separator="none")
    assert not np.isin(reader.split("train").tokens_RT[0, :5], [1, 2]).any()


def test_a_flipped_token_is_found(make: Make, write: Write) -> None:
    reader = make(sources=[write(records())])
    path = reader.folder / "train.tokens.npy"
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="train"):
        CorpusReader(reader.folder).verify()


def test_a_missing_or_short_file_is_refused(make: Make, write: Write) -> None:
    reader = make(sources=[write(records())])
    np.save(reader.folder / "train.flags.npy", np.zeros((1, 16), np.uint8))
    with pytest.raises(IntegrityError, match=r"train\.flags\.npy has shape"):
        CorpusReader(reader.folder).split("train")
    (reader.folder / "train.flags.npy").unlink()
    with pytest.raises(IntegrityError, match="cannot read"):
        CorpusReader(reader.folder).split("train")
    with pytest.raises(IntegrityError, match=r"corpus\.json is missing"):
        CorpusReader(reader.folder / "tokenizer")


def test_another_format_version_is_refused(make: Make, write: Write) -> None:
    reader = make(sources=[write(records())])
    meta = reader.folder / "corpus.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(IntegrityError, match="format 2"):
        CorpusReader(reader.folder)


def test_caps_bound_the_rows(make: Make, write: Write) -> None:
    data: list[Any] = [{"text": f"document {n} " + "lazy dogs " * 20} for n in range(20)]
    for packing in ("concat", "isolate", "single"):
        reader = make(sources=[write(data)], train_tokens=100, packing=packing)
        assert len(reader.split("train")) == 100 // 16


@pytest.mark.parametrize("separator", ["eos", "bos", "none", "<|endoftext|>", "the", "<|nothing|>", "<|nothing|> the"])
def test_the_files_declare_what_the_tokenizer_has(tokenizer_folder: Path, separator: str) -> None:
    """What the files show without transformers is what transformers finds."""
    from lmdistill.checkpoints import load_tokenizer
    from lmdistill.corpus.tokenizers import declares, separator_id
    from lmdistill.errors import PreflightError

    if declares(tokenizer_folder, separator):
        assert (separator_id(load_tokenizer(tokenizer_folder), separator) is None) == (separator == "none")
    else:
        with pytest.raises(PreflightError):
            separator_id(load_tokenizer(tokenizer_folder), separator)
