"""Teachers for captures on a Ray cluster; workers import this file, so what they do is told by files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from signals_synthetic import BigramEngine, always

from lmdistill.errors import StageError
from lmdistill.signals.variants import compact
from lmdistill.teachers.engine import TopK

compact.pays = always  # in the workers too, as conftest.py has it in the tests' own process


class RecordedEngine(BigramEngine):
    """Notes every row it scores in a file of its process, in `folder`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__(seconds=seconds)
        self.folder = folder

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        with (self.folder / str(os.getpid())).open("a") as file:
            file.writelines(f"{row_name(row)}\n" for row in tokens_BT)
        return super().score(tokens_BT, starts_BT)


class RefusingEngine(BigramEngine):
    """Fails as an engine of lmdistill does."""

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        raise StageError("the teacher is gone", why="a test", fix="nothing")


class BrokenEngine(BigramEngine):
    """Fails at one row, as a library may: without a word that lmdistill knows."""

    def __init__(self, row: str) -> None:
        super().__init__()
        self.row = row

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        if self.row in map(row_name, tokens_BT):
            raise ValueError("out of something")
        return super().score(tokens_BT, starts_BT)


def row_name(tokens_T: NDArray[Any]) -> str:
    """A row's digest."""
    return hashlib.sha256(tokens_T.astype("<i4").tobytes()).hexdigest()[:16]
