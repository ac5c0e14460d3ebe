"""One toy corpus and one undisturbed capture of it, for all that fill its disk or kill it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust import toy_run

ROWS, SHARD_ROWS = 512, 16


@dataclass(frozen=True)
class Captured:
    """Run folders beside the toy: `base` has a finished corpus, `whole` an undisturbed capture besides."""

    toy: toy_run.ToyRun
    scratch: Path

    @property
    def base(self) -> Path:
        """With the corpus alone."""
        return self.scratch / "base"

    def files(self) -> dict[str, str]:
        """The undisturbed capture's files and their digests."""
        return toy_run.cache_files(self.scratch / "whole")


def captured(scratch: Path) -> Captured:
    """Make the toy and run it to its end."""
    found = Captured(toy_run.make(scratch / "toy", "mmap", ROWS, SHARD_ROWS), scratch)
    found.toy.succeed(found.base, "--until", "corpus")
    found.toy.succeed(toy_run.fresh_copy(found.base, scratch / "whole"))
    return found
