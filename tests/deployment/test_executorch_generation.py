"""Tokens are chosen as the preset says, and answers end where they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmdistill.deployment.executorch.generation import choose, generate
from lmdistill.deployment.runner import Sampling

LOGITS = np.log(np.array([0.1, 0.5, 0.25, 0.15], np.float32))
PLAIN: dict[str, Any] = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1, "seed": 0}


def drawn(**keys: Any) -> dict[int, float]:
    """Share of each token over evenly spaced draws."""
    draws = (np.arange(2000) + 0.5) / 2000
    tokens = [choose(LOGITS, keys.get("before", ()), Sampling(**(PLAIN | keys["sampling"])), draw) for draw in draws]
    return {int(token): count / 2000 for token, count in zip(*np.unique(tokens, return_counts=True), strict=True)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {0: 0.1, 1: 0.5, 2: 0.25, 3: 0.15}),
        ({"temperature": 0}, {1: 1.0}),
        ({"temperature": 0.5}, {0: 0.01 / 0.345, 1: 0.25 / 0.345, 2: 0.0625 / 0.345, 3: 0.0225 / 0.345}),
        ({"top_k": 2}, {1: 2 / 3, 2: 1 / 3}),
        ({"top_p": 0.7}, {1: 2 / 3, 2: 1 / 3}),
        ({"min_p": 0.4}, {1: 2 / 3, 2: 1 / 3}),
    ],
)
def test_the_distribution_is_the_presets(sampling: dict[str, Any], expected: dict[int, float]) -> None:
    assert drawn(sampling=sampling) == pytest.approx(expected, abs=1e-3)


def test_what_was_said_is_said_less() -> None:
    shares = drawn(sampling={"repeat_penalty": 2}, before=[1])
    assert shares[1] == pytest.approx(0.25 / 0.75, abs=1e-3)  # log 0.5 is doubled


class Counting:
    """A runtime in which token t is followed by t + 1."""

    context = 8

    def read(self, tokens_T: list[int], start: int = 0) -> torch.Tensor:
        assert start + len(tokens_T) <= self.context
        return torch.nn.functional.one_hot(torch.tensor((tokens_T[-1] + 1) % 10), 10).float()


def test_answers_end_at_an_end_a_limit_or_the_end_of_the_caches() -> None:
    greedy = Sampling(**(PLAIN | {"temperature": 0}))
    runtime: Any = Counting()
    assert list(generate(runtime, [0, 1], greedy, frozenset({5}), 100)) == [2, 3, 4]
    assert list(generate(runtime, [0, 1], greedy, frozenset(), 3)) == [2, 3, 4]
    assert list(generate(runtime, [0, 1], greedy, frozenset(), 100)) == [2, 3, 4, 5, 6, 7]
