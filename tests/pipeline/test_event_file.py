"""events.jsonl on a full disk: the error says which file could not be written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lmdistill.pipeline.events import EventFile

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """When an event is written, and when what could not be written is tried again on closing."""
    events = EventFile(tmp_path / "events.jsonl")
    events.file.close()
    events.file = FULL.open("w", encoding="utf-8", buffering=1)
    for step in (lambda: events.handle("note", {"text": "x"}), events.close):
        with pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl") as full:
            step()
        assert full.value.errno == errno.ENOSPC
