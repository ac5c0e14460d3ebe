"""The errors a user can cause or meet: what happened, why, and what to do. Never shown as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmdistillError(Exception):
    """A failure with a message for the user; the command line prints it and exits with `exit_code`."""

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        """Say what happened, why it is so, and what the user can do about it."""
        self.what, self.why, self.fix = what, why, fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message as it is printed: one line each for what, why and what to do."""
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  do:  {self.fix}")
        return "\n".join(lines)


class RecipeError(LmdistillError):
    """The recipe is wrong: names file, line, key, what is allowed, the nearest name."""


class AssetError(LmdistillError):
    """A model or data file is missing, or is not the one the recipe asks for (sha256)."""


class PreflightError(LmdistillError):
    """Something known before work starts would make a stage fail."""


class IntegrityError(LmdistillError):
    """Bytes on disk are not what was written, or do not belong together."""


class StageError(LmdistillError):
    """A stage failed while it ran; `fix` names its log."""


class LockedError(LmdistillError):
    """Another pipeline works in the same run folder."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no word is near."""
    close = difflib.get_close_matches(str(word), sorted(words), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
