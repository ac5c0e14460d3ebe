"""Shows a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PLAIN_EVERY = 10.0  # seconds between two plain lines of progress


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `8.2 s`, `3 min 05 s`, `2 h 10 min`; `?` where unknown."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def size(count: float | None) -> str:
    """Bytes as people say them: `812 kB`, `1.2 GB`; `?` where unknown."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def amount(value: float) -> str:
    """A count with thousands set apart; fractions with three digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def figures_text(figures: dict[str, Any]) -> str:
    """`loss 3.21, tokens/s 812`."""
    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in figures.values())
    return ", ".join(f"{name} {text}" for name, text in zip(figures, shown, strict=True))


class PlainDisplay:
    """One line for each thing that happens; progress at most every ten seconds."""

    def __init__(self, console: Console) -> None:
        """Print to `console`."""
        self.console = console
        self.label = ""
        self.shown = time.monotonic()
        self.origin: tuple[float, float] | None = None  # time and count at the first progress: a resumed stage's rate

    def say(self, text: str) -> None:
        """One line, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def handle(self, event: str, fields: dict[str, Any]) -> None:
        """Show one event."""
        show = getattr(self, f"on_{event}", None)
        if show is not None:
            show(fields)

    def on_stage_cached(self, fields: dict[str, Any]) -> None:
        """It is there already."""
        self.say(f"[{fields['number']}/{fields['of']}] {fields['stage']}: cached ({fields['folder']})")

    def begin(self, label: str, how: str) -> None:
        """Other work than before."""
        self.label, self.shown, self.origin = label, time.monotonic(), None
        self.say(f"{label}: {how}")

    def on_fetch_started(self, fields: dict[str, Any]) -> None:
        """Assets are missing."""
        self.begin("assets", f"fetching {len(fields['sources'])}")

    def on_fetch_finished(self, fields: dict[str, Any]) -> None:
        """Assets are here."""
        self.say(f"{self.label}: done in {duration(fields['seconds'])}")

    def on_stage_started(self, fields: dict[str, Any]) -> None:
        """Work begins."""
        label = f"[{fields['number']}/{fields['of']}] {fields['stage']}"
        self.begin(label, "resumed" if fields["resumed"] else "started")

    def on_progress(self, fields: dict[str, Any]) -> None:
        """So far."""
        now, done, total = time.monotonic(), fields["done"], fields["total"]
        self.origin = self.origin or (now, done)
        if now - self.shown < PLAIN_EVERY:
            return
        self.shown = now
        since, first = self.origin
        left = duration((now - since) * (total - done) / (done - first)) if done > first else "?"
        figures = figures_text(fields["figures"])
        text = f"{amount(done)}/{amount(total)} {fields['unit']}".rstrip()
        self.say(f"{self.label}: {text}{f' ({figures})' if figures else ''}, {left} left")

    def on_note(self, fields: dict[str, Any]) -> None:
        """A line of a stage."""
        self.say(f"    {fields['text']}")

    def on_stage_finished(self, fields: dict[str, Any]) -> None:
        """Published."""
        self.say(f"{self.label}: done in {duration(fields['seconds'])} ({fields['folder']})")

    def close(self) -> None:
        """Nothing to put away."""


class LiveDisplay(PlainDisplay):
    """The same lines, and below them a bar for the work in hand."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`, which is a terminal."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__(console)
        text = TextColumn("{task.description} {task.fields[counts]}", markup=False)
        figures = TextColumn("{task.fields[figures]}", markup=False)
        columns = (text, BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), figures)
        self.bar = Progress(*columns, console=console, transient=True)
        self.task: TaskID | None = None

    def begin(self, label: str, how: str) -> None:
        """Other work than before: a bar of its own."""
        super().begin(label, how)
        self._drop()
        self.task = self.bar.add_task(self.label, total=None, counts="", figures="")
        self.bar.start()

    def on_progress(self, fields: dict[str, Any]) -> None:
        """So far."""
        if self.task is None:
            return
        done, total = fields["done"], fields["total"]
        counts = f"{amount(done)}/{amount(total)} {fields['unit']}"
        shown = figures_text(fields["figures"])
        self.bar.update(self.task, completed=done, total=total, counts=counts, figures=shown)

    def on_stage_finished(self, fields: dict[str, Any]) -> None:
        """Published."""
        self._drop()
        super().on_stage_finished(fields)

    def on_fetch_finished(self, fields: dict[str, Any]) -> None:
        """Assets are here."""
        self._drop()
        super().on_fetch_finished(fields)

    def close(self) -> None:
        """Take the bar away."""
        self._drop()

    def _drop(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        self.bar.stop()


def make_display(console: Console) -> PlainDisplay:
    """A bar on a terminal, lines elsewhere."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
