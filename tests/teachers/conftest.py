"""Fixtures for teachers."""

from __future__ import annotations

import pytest
from teachers_toys import VOCAB, save_toy

from lmdistill.pipeline.stage import ModelRef


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A tiny Llama whose head has ten rows of padding."""
    return save_toy(tmp_path_factory.mktemp("toy"), rows=VOCAB + 10)
