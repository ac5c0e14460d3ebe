"""Runtimes are found by name, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmdistill.errors import PreflightError
from lmdistill.evaluation.runtimes import runtime_class

ONE_BY_ITSELF = """
import lmdistill.evaluation.runtimes.llama_cpp
from lmdistill.evaluation.runtimes import runtime_class
print(runtime_class("executorch").__name__, runtime_class("transformers").__name__)
"""


def test_a_runtime_is_found_where_another_was_imported_by_itself() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_BY_ITSELF], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PteRuntime", "CheckpointRuntime"]


def test_an_unknown_runtime_is_told_the_known_ones() -> None:
    with pytest.raises(PreflightError, match=r"no runtime 'onnx'(.|\n)*executorch, llama.cpp, transformers"):
        runtime_class("onnx")
