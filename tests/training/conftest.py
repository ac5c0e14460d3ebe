"""A toy teacher, a corpus it speaks, its cache and a student: all real, all small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_toys import LENGTH, ROWS, VOCAB, save_toy, save_word_tokenizer

from lmdistill.corpus.format import DOC_START, LOSS, CorpusMeta, SplitMeta, tokens_digest
from lmdistill.corpus.tokenizers import tokenizer_digest
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext
from lmdistill.stages.teach import TeachConfig, TeachStage


def _speak(teacher: Path) -> np.ndarray:
    """Rows the teacher itself says, so that text and teacher agree."""
    from lmdistill.checkpoints import load_model

    torch.manual_seed(1)
    model = load_model(teacher)
    start = torch.randint(VOCAB, (ROWS, 1))
    said = model.generate(start, max_length=LENGTH, min_length=LENGTH, do_sample=True, pad_token_id=0, top_k=0)
    return said.numpy().astype("<u2")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef("teacher", save_toy(tmp_path_factory.mktemp("teacher"), 0, 0.5), "a" * 64)


@pytest.fixture(scope="session")
def corpus(teacher: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    out = tmp_path_factory.mktemp("corpus") / "out"
    save_word_tokenizer(out / "tokenizer")
    tokens = _speak(teacher.path)
    flags = np.full(tokens.shape, LOSS, np.uint8)
    flags[:, 0], flags[:, -1] = LOSS | DOC_START, 0
    for kind, array in {"tokens": tokens, "flags": flags, "bytes": np.full(ROWS, LENGTH - 1, "u4")}.items():
        np.save(out / f"train.{kind}.npy", array)
    targets = ROWS * (LENGTH - 1)
    split = SplitMeta(ROWS, ROWS, ROWS * LENGTH, targets, targets, tokens_digest(tokens, flags))
    digest = tokenizer_digest(out / "tokenizer")
    (out / "corpus.json").write_text(
        CorpusMeta(LENGTH, "concat", VOCAB, digest, None, None, 0, {"train": split}).to_json()
    )
    return Artefact("corpus", "corpus", "corpus", "c" * 64, out.parent)


@pytest.fixture(scope="session")
def signals(teacher: ModelRef, corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    path = tmp_path_factory.mktemp("signals")
    (path / "out").mkdir()
    config = TeachConfig(k=8, precision="float32", shard_rows=8, batch_rows=4)
    ctx = StageContext(
        "teach", config, {"corpus": [corpus]}, teacher, path / "out", path / "work", runtime=Runtime("cpu")
    )
    TeachStage().run(ctx)
    return Artefact("teach", "teach", "signals", "e" * 64, path)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    path = tmp_path_factory.mktemp("student")
    save_toy(path / "out" / "model", 5, 0.05)
    return Artefact("student", "student", "student", "d" * 64, path)
