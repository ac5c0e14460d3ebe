"""Toy models of every architecture that is written, with the real tokenizer, and what they are measured with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeModel = Callable[..., Path]

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LFM2: dict[str, Any] = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}


@pytest.fixture(scope="session")
def toy(smollm_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A factory of random models by `model_type`; norms differ from one, so that none can be mistaken for another."""
    made: dict[str, Path] = {}

    def make(model_type: str, **keys: Any) -> Path:
        name = repr((model_type, sorted(keys.items())))
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"toy-{model_type}")
            _save(model_type, SHAPE | (LFM2 if model_type == "lfm2" else {}) | keys, made[name])
        return made[name]

    def _save(model_type: str, keys: dict[str, Any], folder: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from lmdistill.checkpoints import save_model

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        save_model(model, folder, smollm_tokenizer_folder)

    return make


@pytest.fixture(scope="session")
def sequences(smollm_tokenizer_folder: Path) -> list[list[int]]:
    """Two sequences of real tokens, one longer than a chunk of logits."""
    from lmdistill.checkpoints import load_tokenizer

    text = "In 1984 the quick brown fox, aged 7, jumped over 12 lazy dogs — naïve, isn't it? 你好!\n" * 12
    ids = load_tokenizer(smollm_tokenizer_folder).encode(text)
    return [ids[:150], ids[40:100]]


@pytest.fixture
def corpus(smollm_tokenizer_folder: Path, sequences: list[list[int]], tmp_path: Path) -> Any:
    """A finished corpus of two rows of 64 real tokens, for training as for measuring."""
    import numpy as np

    from lmdistill.checkpoints import copy_tokenizer
    from lmdistill.corpus.format import LOSS, TOKENIZER_FOLDER, CorpusMeta, SplitMeta, tokens_digest
    from lmdistill.pipeline.stage import Artefact

    folder = tmp_path / "corpus" / "out"
    copy_tokenizer(smollm_tokenizer_folder, folder / TOKENIZER_FOLDER)
    tokens_RT = np.array(sequences[0][:128], np.uint16).reshape(2, 64)
    flags_RT = np.full(tokens_RT.shape, LOSS, np.uint8)
    splits = {}
    for name in ("train", "valid"):
        for kind, array in (("tokens", tokens_RT), ("flags", flags_RT), ("bytes", np.full(2, 200, np.uint32))):
            np.save(folder / f"{name}.{kind}.npy", array)
        splits[name] = SplitMeta(2, 2, 128, 128, 400, tokens_digest(tokens_RT, flags_RT))
    (folder / "corpus.json").write_text(CorpusMeta(64, "concat", 49152, "t", None, None, 0, splits).to_json())
    return Artefact("corpus", "corpus", "corpus", "f" * 64, tmp_path / "corpus")
