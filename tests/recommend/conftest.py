"""A toy teacher and text to recommend a recipe for; stages run in the test's own process, which is quicker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.toy_world import save_toy

from lmdistill.pipeline import preflight, run, worker
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.recommend.request import Request, parse_budget

WORDS = list("abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("teacher") / "toy", seed=3)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of some forty words, one of them twice, one of them empty."""
    texts = [" ".join(WORDS[(i * j + j * j) % len(WORDS)] for j in range(40)) + f" {i}." for i in range(1, 161)]
    file = tmp_path_factory.mktemp("data") / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], ""]))
    return file


class SilentChannel(SilentProgress):
    """What a worker process sends its parent, unheard."""

    def send(self, kind: str, **fields: Any) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages without a process each; all else is the pipeline's own."""

    def call(job: dict[str, Any], *_: Any) -> Any:
        return worker.TASKS[job["task"]](job, SilentChannel())  # type: ignore[arg-type]

    for module in (run, preflight):
        monkeypatch.setattr(module, "call", call)


@pytest.fixture
def request_for(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> Callable[..., Request]:
    def make(**keys: Any) -> Request:
        given: dict[str, Any] = {
            "sources": (str(toy_data),),
            "teacher": str(toy_teacher),
            "out": tmp_path / "notes.yaml",
            "work": tmp_path / "work",
            "budget": parse_budget("24ktok"),
            "depths": (2,),
            "trials": 3,
            "sample_tokens": 1024,
            "device": "cpu",
        }
        return Request(**{**given, **keys})

    return make
