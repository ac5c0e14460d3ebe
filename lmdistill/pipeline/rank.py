"""One of the processes that run a stage together; started by `accelerate launch` in `launcher.py`.

The first (rank 0) tells the parent its progress; all others are silent. What comes of each is left in a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lmdistill.pipeline.launcher import FOLDER, JOB
from lmdistill.pipeline.worker import Channel, die_with_parent, perform


class SilentChannel(Channel):
    """Says nothing; what is printed still goes to the log."""

    def send(self, kind: str, **fields: Any) -> None:
        """Say nothing."""


def main() -> int:
    """Do this process' part of the job; 0 when it is done."""
    rank, folder = int(os.environ["RANK"]), Path(os.environ[FOLDER])
    channel = Channel() if rank == 0 else SilentChannel()
    job = json.loads((folder / JOB).read_text())
    die_with_parent(job["parent"])
    message, status = perform(job, channel)
    partial = folder / f"rank-{rank}.tmp"
    partial.write_text(json.dumps(message | {"time": time.time()}))
    partial.rename(partial.with_suffix(".json"))
    return status


if __name__ == "__main__":
    sys.exit(main())
