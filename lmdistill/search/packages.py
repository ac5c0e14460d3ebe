"""The packages that a search needs, or the timing of its shapes, and which of them are not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from lmdistill.errors import PreflightError

SEARCHING = ("optuna", "scipy")
FITTING = ("scipy",)  # a device's paces, from what was timed
TIMING = ("llama_cpp", "gguf")  # where shapes are timed here


def missing(packages: Iterable[str], who: str) -> list[PreflightError]:
    """An error for each package that is not there; `who` needs it."""
    return [
        PreflightError(f"{who} needs the package {package}", why="not installed", fix="pip install 'lmdistill[search]'")
        for package in packages
        if importlib.util.find_spec(package) is None
    ]
