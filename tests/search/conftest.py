"""The toy world of a search, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from supernet_toys import KEYS, make_corpus, make_profile, make_signals, save_teacher

from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus(teacher: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "out", teacher.path)


@pytest.fixture(scope="session")
def signals(teacher: ModelRef, corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return make_signals(tmp_path_factory.mktemp("signals"), teacher, corpus)


@pytest.fixture(scope="session")
def profile(teacher: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_profile(tmp_path_factory.mktemp("profile") / "toy.json", teacher.path)


@pytest.fixture(scope="session")
def context(teacher: ModelRef, corpus: Artefact, signals: Artefact, profile: Path) -> Callable[..., StageContext[Any]]:
    """The search stage's context in a folder, with keys laid over the toy ones."""

    def make(folder: Path, **keys: Any) -> StageContext[Any]:
        from lmdistill.search.config import SearchConfig

        for name in ("out", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        config = SearchConfig.model_validate({**KEYS, "device": str(profile), **keys})
        inputs = {"signals": [signals], "corpus": [corpus]}
        return StageContext(
            "search", config, inputs, teacher, folder / "out", folder / "work", runtime=Runtime("cpu", 1)
        )

    return make
