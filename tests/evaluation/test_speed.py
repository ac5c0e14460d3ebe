"""Timing in turns: who is timed when, what is thrown away, what is reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdistill.evaluation import speed
from lmdistill.evaluation.speed import SpeedPlan, SpeedTarget


class Clockwork:
    """Stands for a worker process: every phase takes a second, but half of one in the first round."""

    asked: list[tuple[str, str]]

    def __init__(self, target: SpeedTarget, plan: SpeedPlan, log: Path) -> None:
        self.target = target

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def ask(self, what: str, tokens: int = 0) -> float:
        first = (what, self.target.name) not in self.asked
        self.asked.append((what, self.target.name))
        return 0.5 if first else 1.0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    Clockwork.asked = []
    monkeypatch.setattr(speed, "Worker", Clockwork)
    return Clockwork.asked


TARGETS = [SpeedTarget(name, "llama.cpp", Path(name)) for name in "abc"]


def test_every_other_round_goes_backwards(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    speed.measure(TARGETS, SpeedPlan(8, 4, repeats=3, threads=1), tmp_path)
    prefill = "".join(name for what, name in asked if what == "prefill")
    decode = "".join(name for what, name in asked if what == "decode")
    assert prefill == decode == "abc" + "cba" + "abc" + "cba"


def test_the_warm_up_is_no_measurement(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    measured = speed.measure(TARGETS, SpeedPlan(8, 4, repeats=2, threads=1), tmp_path)
    for figures in measured.values():
        rounds = figures["prefill_tps"].pop("rounds")
        assert set(rounds) == {8.0}
        assert figures["prefill_tps"] == dict.fromkeys(("median", "min", "max", "q1", "q3"), 8.0)
        assert figures["decode_tps"]["max"] == 4.0
