"""Fixtures of the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from toy_world import World, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One world for all tests of this area, which only read it."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def config() -> Callable[..., Any]:
    """An evaluate config with short timings."""

    def make(**keys: Any) -> Any:
        from lmdistill.stages.evaluate import EvaluateConfig

        return EvaluateConfig(**{"suite": "quick", "speed": {"prefill": 8, "decode": 4, "repeats": 2}, **keys})

    return make
