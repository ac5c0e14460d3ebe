"""Runs the encoding and writing of rows beside the teacher's forward pass; a failure there stops the run at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from lmdistill.errors import StageError

DEPTH = 4  # batches that may wait: bounds memory where the disk is slower than the teacher
POLL_SECONDS = 0.2


class BackgroundWriter:
    """One thread that does the given calls in order.

    Whatever a call raises is raised again by the next `put`, or on leaving the `with` block: `put` never waits for
    a thread that is gone.
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue(DEPTH)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="signals-writer", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self._error = self._error or StageError("the run stopped")  # what still waits is dropped
        self._offer(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, call: Callable[[], Any]) -> None:
        """Queue a call; waits while the queue is full, raises what an earlier call raised."""
        if not self._offer(call):
            self._raise()
            raise StageError("the writer of the teacher cache is gone", fix="run the same command again")

    def _offer(self, call: Callable[[], Any] | None) -> bool:
        """Queue a call unless the thread has failed or ended; True where it was queued."""
        while self._thread.is_alive() and (call is None or self._error is None):
            try:
                self._calls.put(call, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is not None:
                continue  # drain, so that nobody waits
            try:
                call()
            except BaseException as error:  # handed to the thread that runs the teacher
                self._error = error
