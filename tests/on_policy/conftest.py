"""A toy teacher and student with an end-of-sequence token, and a corpus of conversations in their tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
from on_policy_toys import EOS, LENGTH, ROWS, VOCAB, save_toy, write_corpus

from lmdistill.corpus.format import DOC_START, LOSS
from lmdistill.pipeline.stage import Artefact, ModelRef


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef("teacher", save_toy(tmp_path_factory.mktemp("teacher"), 0, 0.2), "a" * 64)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    path = tmp_path_factory.mktemp("student")
    save_toy(path / "out" / "model", 0, 0.05)  # the same directions as its teacher, shorter
    return Artefact("student", "student", "student", "d" * 64, path)


@pytest.fixture(scope="session")
def chats(teacher: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """Rows of conversations of two turns: ask, answer, ask, answer; only the answers count."""
    out = tmp_path_factory.mktemp("chats") / "out"
    generator = np.random.default_rng(0)
    tokens = generator.integers(EOS + 1, VOCAB, (ROWS, LENGTH)).astype("<u2")
    flags = np.zeros(tokens.shape, np.uint8)
    for row in range(ROWS):
        cut = 3 + row % 4
        flags[row, 0] |= DOC_START
        flags[row, cut - 1 : 11] |= LOSS  # predicts tokens cut … 11
        flags[row, 15:23] |= LOSS  # predicts tokens 16 … 23
    tokens[:, 11] = tokens[:, 23] = EOS
    write_corpus(out, tokens, flags)
    assert json.loads((out / "corpus.json").read_text())["splits"]["train"]["rows"] == ROWS
    return Artefact("corpus", "corpus", "corpus", "c" * 64, out.parent)
