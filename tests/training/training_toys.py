"""Shapes and makers of the toy world that distillation is tested in: a small Llama and a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

QUICK = {"tokens": LENGTH * 8 * 12, "batch_rows": 8, "lr": 0.2, "precision": "float32", "log_steps": 2}


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


def train_toy(
    folder: Path, signals: Any, student: Any, teacher: Any = None, beside: Any = None, **keys: Any
) -> dict[str, Any]:
    """The distill stage on toy artefacts, in `folder`, on one thread; `beside`: more inputs. Returns training.json."""
    from lmdistill.pipeline.stage import Runtime, StageContext
    from lmdistill.stages.distill import DistillConfig, DistillStage

    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    config = DistillConfig.model_validate({**QUICK, **keys})
    inputs = {"signals": [signals], "student": [student], **(beside or {})}
    ctx = StageContext("distill", config, inputs, teacher, folder / "out", folder / "work", runtime=Runtime("cpu", 1))
    DistillStage().verify(ctx, DistillStage().run(ctx))
    record: dict[str, Any] = json.loads((folder / "out" / "training.json").read_text())
    return record


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
