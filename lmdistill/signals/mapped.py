"""Files mapped into memory whose pages are given back as reading goes on, however large the cache is.

A page that was read once stays in the process' resident memory until it is given back; the system's own cache of the
file is not touched, so that reading it again costs no disk.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 2**22  # read before pages go back; up to five times that is resident, as neighbours come with a page


class MappedFiles:
    """The mapped files of one reader."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self._read = most_bytes, 0
        self._maps: dict[Path, mmap.mmap] = {}
        self._touched: set[Path] = set()

    def open(self, path: Path) -> NDArray[np.uint8]:
        """The bytes of a file that is not empty; tell `note` what was read of them."""
        with path.open("rb") as file:
            self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[path], np.uint8)

    def note(self, path: Path, size: int) -> None:
        """So many bytes were copied out of a file; gives pages back where that was enough."""
        self._read += size
        self._touched.add(path)
        if self._read < self.most_bytes:
            return
        if sys.platform != "win32":  # there pages stay until the system wants them
            for touched in self._touched:
                self._maps[touched].madvise(mmap.MADV_DONTNEED)
        self._read = 0
        self._touched.clear()
