"""Toy teachers of a few thousand parameters, with a tokenizer of one token a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS, CorpusMeta, SplitMeta, tokens_digest
from lmdistill.pipeline.stage import Artefact, ModelRef

VOCAB = 90
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def save_tokenizer(folder: Path, vocab: int = VOCAB, prefix: str = "w") -> None:
    """A word-level tokenizer.json with `vocab` tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"{prefix if i == 3 else 'w'}{i}": i for i in range(vocab)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def save_toy(folder: Path, kind: str = "llama", rows: int = VOCAB, seed: int = 0, **config: Any) -> ModelRef:
    """A random model of `kind` with `rows` logits, saved with the toy tokenizer."""
    import transformers

    names = {"llama": "Llama", "lfm2": "Lfm2", "granite": "Granite"}
    made = getattr(transformers, f"{names[kind]}Config")(vocab_size=rows, **(SMALL | config))
    torch.manual_seed(seed)
    getattr(transformers, f"{names[kind]}ForCausalLM")(made).save_pretrained(folder)
    save_tokenizer(folder)
    return ModelRef(kind, folder, "d" * 64, str(folder))


def save_corpus(
    folder: Path, tokens: NDArray[Any], vocab: int = VOCAB, packing: str = "concat", starts: tuple[int, ...] = ()
) -> Artefact:
    """A corpus artefact of rows [R, T] in `folder`, whose out/tokenizer is there; documents start at 0 and `starts`."""
    rows, length = tokens.shape
    tokens = tokens.astype("<u2")
    flags = np.full((rows, length), LOSS, np.uint8)
    flags[:, [0, *starts]] |= DOC_START
    flags[:, -1] = 0
    for kind, array in {"tokens": tokens, "flags": flags, "bytes": np.full(rows, length - 1, "u4")}.items():
        np.save(folder / f"out/train.{kind}.npy", array)
    targets = rows * (length - 1)
    split = SplitMeta(rows, rows, rows * length, targets, targets, tokens_digest(tokens, flags))
    meta = CorpusMeta(length, packing, vocab, "t" * 64, None, None, 0, {"train": split})
    (folder / "out/corpus.json").write_text(meta.to_json())
    return Artefact("corpus", "corpus", "corpus", "f" * 64, folder)
