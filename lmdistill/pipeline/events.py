"""What happens in a run, as a stream of events: kept in events.jsonl and shown on the terminal.

Events: run_started, fetch_started, fetch_finished, stage_cached, stage_started, progress, note, stage_finished,
stage_failed, run_finished, gates_failed, run_interrupted. Each line has `time` (UTC, ISO 8601) and `event`; those about
a stage have `stage`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Something that wants to know what happens."""

    def handle(self, event: str, fields: dict[str, Any]) -> None:
        """Take one event."""

    def close(self) -> None:
        """No more events will come."""


class EventFile:
    """Appends every event to a file, one JSON object a line. An OSError, of a full disk say, names the file."""

    def __init__(self, path: Path) -> None:
        """Open the file; earlier runs' events stay."""
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = path.read_bytes() if path.exists() else b""
        self.path, self.file = path, path.open("a", encoding="utf-8", buffering=1)
        if earlier and not earlier.endswith(b"\n"):  # a power cut left half a line: the next event begins its own
            self.file.write("\n")

    def handle(self, event: str, fields: dict[str, Any]) -> None:
        """Write one line."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with self._named():
            self.file.write(json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        with self._named():
            self.file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Writing to an open file fails without its name."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class Events:
    """Hands each event to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        """Take the sinks over; `close` closes them."""
        self.sinks = list(sinks)

    def emit(self, event: str, **fields: Any) -> None:
        """Something happened."""
        for sink in self.sinks:
            sink.handle(event, fields)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run folder; a line that a power cut left half-written is skipped."""
    events: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events
