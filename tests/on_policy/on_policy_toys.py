"""Small Llamas with a tokenizer of words that names an end of sequence, corpora by hand, and the stage's contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lmdistill.corpus.format import LOSS, CorpusMeta, SplitMeta, tokens_digest
from lmdistill.corpus.tokenizers import tokenizer_digest
from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext
from lmdistill.stages.on_policy import OnPolicyStage

VOCAB, EOS, ROWS, LENGTH = 60, 1, 12, 32
KEYS: dict[str, Any] = {
    "batch_prompts": 4,
    "steps": 6,
    "max_prompt_tokens": 20,
    "max_new_tokens": 6,
    "lr": 0.1,
    "precision": "float32",
    "save_grid": "float32",
    "log_steps": 2,
    "checkpoint_steps": 2,
    "sampler": "transformers",
    "chunk": 16,
}
STAGE = OnPolicyStage()


def word(index: int, prefix: str = "w") -> str:
    """No word is the beginning of another: the one that ends a sequence is matched first, wherever it stands."""
    return f"{prefix}{index}."


def save_tokenizer(folder: Path, prefix: str = "w") -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word(i, prefix): i for i in range(VOCAB)}, unk_token=word(0, prefix)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    asks, answers, ends = (word(i, prefix) for i in (2, 3, EOS))
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{asks} {{{{ m.content }}}} "
        f"{{% else %}}{answers} {{{{ m.content }}}} {ends} {{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answers} {{% endif %}}"
    )
    about = {
        "eos_token": word(EOS, prefix),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def save_toy(folder: Path, seed: int, spread: float, **shape: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    keys = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "initializer_range": spread,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    LlamaForCausalLM(LlamaConfig(**keys | shape)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_corpus(out: Path, tokens_RT: np.ndarray, flags_RT: np.ndarray) -> None:
    save_tokenizer(out / "tokenizer")
    for kind, array in {"tokens": tokens_RT, "flags": flags_RT, "bytes": np.ones(len(tokens_RT), "u4")}.items():
        np.save(out / f"train.{kind}.npy", array)
    targets = int((flags_RT & LOSS).sum())
    split = SplitMeta(
        len(tokens_RT), len(tokens_RT), tokens_RT.size, targets, targets, tokens_digest(tokens_RT, flags_RT)
    )
    digest = tokenizer_digest(out / "tokenizer")
    meta = CorpusMeta(tokens_RT.shape[1], "concat", VOCAB, digest, None, None, 0, {"train": split})
    (out / "corpus.json").write_text(meta.to_json())


def context(
    folder: Path, corpus: Artefact | None, student: Artefact, teacher: ModelRef, **keys: Any
) -> StageContext[OnPolicyConfig]:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    inputs = {"student": [student], "corpus": [] if corpus is None else [corpus]}
    config = OnPolicyConfig(**KEYS | keys)
    return StageContext(
        "on_policy", config, inputs, teacher, folder / "out", folder / "work", runtime=Runtime("cpu", 1)
    )


def train(folder: Path, corpus: Artefact | None, student: Artefact, teacher: ModelRef, **keys: Any) -> dict[str, Any]:
    ctx = context(folder, corpus, student, teacher, **keys)
    STAGE.verify(ctx, STAGE.run(ctx))
    record: dict[str, Any] = json.loads((folder / "out" / "training.json").read_text())
    return record


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
