"""What is shown: plain lines, a bar on a terminal, figures as people say them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lmdistill.pipeline import display
from lmdistill.pipeline.display import LiveDisplay, PlainDisplay, amount, duration, make_display, size

STARTED = {"number": 2, "of": 5, "stage": "teach", "resumed": False}
FINISHED = {"stage": "teach", "seconds": 61.0, "folder": "02-teach-abc"}
PROGRESS = {
    "stage": "teach",
    "done": 50,
    "total": 100,
    "unit": "rows",
    "figures": {"tokens/s": 812.345, "state": "warm"},
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_units() -> None:
    assert [duration(s) for s in (None, 0.42, 185, 7800)] == ["?", "0.4 s", "3 min 05 s", "2 h 10 min"]
    assert [size(n) for n in (None, 5, 98_362_432, 1.2e13)] == ["?", "5 B", "98.4 MB", "12 TB"]
    assert [amount(n) for n in (1234567, 0.5)] == ["1,234,567", "0.5"]


def test_plain_lines_and_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(display.time, "monotonic", clock)
    text = io.StringIO()
    shown = make_display(Console(file=text, width=120))
    assert type(shown) is PlainDisplay
    shown.handle("stage_started", STARTED | {"resumed": True})
    shown.handle("progress", PROGRESS | {"done": 40})
    clock.now = 20.0
    shown.handle("progress", PROGRESS)
    clock.now = 25.0
    shown.handle("progress", PROGRESS | {"done": 60})
    shown.handle("stage_finished", FINISHED)
    shown.handle("an event it does not know", {})
    assert text.getvalue().splitlines() == [
        "[2/5] teach: resumed",
        "[2/5] teach: 50/100 rows (tokens/s 812.3, state warm), 1 min 40 s left",
        "[2/5] teach: done in 1 min 01 s (02-teach-abc)",
    ]


def test_bar_on_a_terminal() -> None:
    text = io.StringIO()
    shown = make_display(Console(file=text, force_terminal=True, width=140))
    assert type(shown) is LiveDisplay
    shown.handle("progress", PROGRESS)
    shown.handle("fetch_started", {"sources": ["a"]})
    shown.handle("progress", PROGRESS)
    shown.handle("fetch_finished", {"seconds": 1.0})
    shown.handle("stage_started", STARTED)
    shown.handle("progress", PROGRESS)
    shown.bar.refresh()
    shown.handle("note", {"text": "[not markup]"})
    shown.handle("stage_finished", FINISHED)
    shown.close()
    output = text.getvalue()
    assert "50/100 rows" in output
    assert "tokens/s 812.3, state warm" in output
    assert "[not markup]" in output
    assert "done in 1 min 01 s" in output
