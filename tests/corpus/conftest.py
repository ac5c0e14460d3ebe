"""A small byte-level tokenizer with a chat template, and helpers that write sources and build corpora."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_samples import make_tokenizer

from lmdistill.asset_spec import AssetSpec
from lmdistill.corpus.build import build
from lmdistill.corpus.config import CorpusConfig
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import SilentProgress


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write records as JSON lines; returns the path as a recipe would name it."""

    def written(records: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return written


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., CorpusReader]:
    """Build a corpus from config keys, in a folder of its own; `run` names the folder, to come back to it."""
    runs = iter(range(1000))

    def made(*, workers: int = 1, run: str | None = None, tokenizer: Path | None = None, **keys: Any) -> CorpusReader:
        config = CorpusConfig.model_validate({"sequence_length": 16, "valid_fraction": 0.0, **keys})
        folder = tmp_path / (run or f"run-{next(runs)}")
        out, work = folder / "out", folder / "work"
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        paths = [Path(AssetSpec(source=source.source).location.name) for source in config.sources]
        build(config, paths, tokenizer or tokenizer_folder, out, work, SilentProgress(), workers)
        reader = CorpusReader(out)
        reader.verify()
        return reader

    return made
