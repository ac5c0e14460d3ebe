"""Pages of mapped files go back to the system: a reader's memory does not grow with what it has read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmdistill.signals.mapped import MappedFiles

PIECE, PIECES, FILES = 2**20, 24, 2
READ_ALL = """
import json, sys
from pathlib import Path
from lmdistill.evaluation.speed_worker import peak_rss_bytes
from lmdistill.signals.mapped import MappedFiles

files, before, found = MappedFiles(int(sys.argv[1])), peak_rss_bytes(), 0
for path in map(Path, sys.argv[2:]):
    data = files.open(path).reshape(-1, 2**20)
    for row in data:
        found += int(row.sum())
        files.note(path, len(row))
print(json.dumps([found, peak_rss_bytes() - before]))
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("mapped"), np.random.default_rng(0)
    for number in range(FILES):
        rng.integers(0, 256, PIECE * PIECES, np.uint8).tofile(folder / str(number))
    return [folder / str(number) for number in range(FILES)]


def read_all(most: int, paths: list[Path]) -> tuple[int, int]:
    """The sum of all bytes, and by how much the reading process' peak grew."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(most), *map(str, paths)], capture_output=True, text=True, check=True
    )
    total, grew = json.loads(done.stdout)
    return total, grew


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted so on Linux")
def test_the_peak_is_bounded_by_what_is_read_before_pages_go_back(paths):
    """Both read every byte; the one that never gives back holds them all."""
    total, held = read_all(2**40, paths)
    again, bounded = read_all(2**22, paths)
    assert total == again == sum(int(np.fromfile(path, np.uint8).sum()) for path in paths)
    assert held > 0.9 * PIECE * PIECES * FILES
    assert bounded < 4 * 2**22 < held / 2


def test_bytes_are_the_files_after_pages_went_back(paths):
    """In any order, again and again."""
    files, wanted = MappedFiles(PIECE), {path: np.fromfile(path, np.uint8) for path in paths}
    data = {path: files.open(path) for path in paths}
    for number in np.random.default_rng(1).integers(0, PIECES * FILES, 60):
        path, start = paths[number % FILES], number // FILES * PIECE
        assert (data[path][start : start + PIECE] == wanted[path][start : start + PIECE]).all()
        files.note(path, PIECE)
