"""Fixtures of the toy pipeline, taken over by the conftest of each area that uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STAGES = Path(__file__).parent / "stages"

RECIPE = """\
name: toy
stages:
  - stage: gather
    text: hello
  - stage: learn
    steps: 4
  - stage: learn
    name: again
    from: gather
    steps: 2
  - stage: summary
"""


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The toy stages are known, here and in child processes; the current directory and the cache are empty."""
    monkeypatch.setenv("LMDISTILL_STAGES", str(STAGES))
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file into the current directory; by default the toy recipe."""

    def write(text: str = RECIPE, name: str = "toy.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return Path(name)

    return write


@pytest.fixture
def lmdistill(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as users do."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lmdistill", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)

    return run


def teacher_folder(parent: Path) -> Path:
    """A folder that looks like a checkpoint."""
    folder = parent / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def manifests(run_dir: Path) -> dict[str, str]:
    """Folder name → manifest.json of every finished artefact."""
    return {file.parent.name: file.read_text() for file in sorted(run_dir.glob("[0-9]*/manifest.json"))}
