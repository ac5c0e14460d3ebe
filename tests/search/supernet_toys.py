"""A toy teacher, text that it speaks, its cache, and a device whose paces are known: a search in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmdistill.corpus.format import DOC_START, LOSS, CorpusMeta, SplitMeta, tokens_digest
from lmdistill.corpus.tokenizers import tokenizer_digest
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext

VOCAB, ROWS, LENGTH, BLOCKS = 64, 16, 24, 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
KEYS: dict[str, Any] = {
    "space": {
        "depth": [2, 3],
        "hidden_sizes": [32, 64],
        "intermediate_sizes": [64, 96],
        "kv_heads": [1, 2],
        "kernels": [2, 3],
    },
    "timing": {"candidates": 12, "prompts": [32]},
    "heldout_rows": 4,
    "selection_rows": 2,
    "selection_width": 1,
    "training": {"batch_rows": 4, "lr": 0.02, "checkpoint_steps": 2},
    "supernet": {"tokens": LENGTH * 4 * 6, "importance_rows": 4, "fit_rows": 4, "fit_steps": 2, "fit_batch_rows": 2},
    "evolution": {"population": 4, "generations": 3},
    "finalists": {"count": 3, "fit_steps": 1, "tokens": LENGTH * 4 * 2},
    "precision": "float32",
}


def save_words(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{index}": index for index in range(VOCAB)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def save_teacher(folder: Path, **keys: Any) -> ModelRef:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(SHAPE | keys))).save_pretrained(folder)
    save_words(folder)
    return ModelRef("teacher", folder, "a" * 64)


def make_corpus(out: Path, teacher: Path) -> Artefact:
    from lmdistill.checkpoints import load_model

    save_words(out / "tokenizer")
    torch.manual_seed(1)
    start = torch.randint(VOCAB, (ROWS, 1))
    said = load_model(teacher).generate(
        start, max_length=LENGTH, min_length=LENGTH, do_sample=True, pad_token_id=0, top_k=0
    )
    tokens = said.numpy().astype("<u2")
    flags = np.full(tokens.shape, LOSS, np.uint8)
    flags[:, 0], flags[:, -1] = LOSS | DOC_START, 0
    for kind, array in {"tokens": tokens, "flags": flags, "bytes": np.full(ROWS, LENGTH - 1, "u4")}.items():
        np.save(out / f"train.{kind}.npy", array)
    targets = ROWS * (LENGTH - 1)
    split = SplitMeta(ROWS, ROWS, ROWS * LENGTH, targets, targets, tokens_digest(tokens, flags))
    meta = CorpusMeta(LENGTH, "concat", VOCAB, tokenizer_digest(out / "tokenizer"), None, None, 0, {"train": split})
    (out / "corpus.json").write_text(meta.to_json())
    return Artefact("corpus", "corpus", "corpus", "c" * 64, out.parent)


def make_signals(path: Path, teacher: ModelRef, corpus: Artefact) -> Artefact:
    from lmdistill.stages.teach import TeachConfig, TeachStage

    (path / "out").mkdir(parents=True)
    config = TeachConfig(k=8, precision="float32", shard_rows=8, batch_rows=4)
    inputs = {"corpus": [corpus]}
    TeachStage().run(
        StageContext("teach", config, inputs, teacher, path / "out", path / "work", runtime=Runtime("cpu", 1))
    )
    return Artefact("teach", "teach", "signals", "e" * 64, path)


def make_profile(path: Path, teacher: Path, keys: dict[str, Any] = KEYS) -> Path:
    """Of a device that takes a nanosecond a parameter and token, and a microsecond a layer."""
    from lmdistill.pipeline.files import write_json
    from lmdistill.search.config import SearchConfig
    from lmdistill.search.on_device import request_for
    from lmdistill.search.profile import DECODE, Measured, Profile, prefill_task
    from lmdistill.search.space import Space

    config = SearchConfig.model_validate(keys)
    space = Space(config.space, json.loads((teacher / "config.json").read_text()), config.timing.format)
    asked = request_for(space, config.timing)
    profile = Profile(asked.plan, asked.reference, {"machine": "toy"})

    def seconds(candidate: Any) -> dict[str, list[float]]:
        token = candidate.parameters * 1e-9 + candidate.depth * 1e-6
        return {DECODE: [token * asked.plan.decode], **{prefill_task(n): [token * n / 4] for n in asked.plan.prompts}}

    profile.add(
        Measured(one, seconds(one), seconds(asked.reference), one.parameters * 2, one.parameters)
        for one in asked.candidates
    )
    write_json(path, profile.to_json())
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
