"""Shapes and makers of the toy world that distillation is tested in: a small Llama and a tokenizer of words."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB, ROWS, LENGTH = 60, 24, 32
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def save_word_tokenizer(folder: Path, words: int = VOCAB, prefix: str = "w") -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(WordLevel({f"{prefix}{i}": i for i in range(words)}, unk_token=f"{prefix}0")).save(
        str(folder / "tokenizer.json")
    )


def save_toy(folder: Path, seed: int, spread: float) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=spread)).save_pretrained(folder)
    save_word_tokenizer(folder)
    return folder
