"""How fast one core reads a teacher cache: decoded to arrays a loss can use, the alignment proof included.

Axes: R rows.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.reader import SignalsReader

READ_ROWS = 32  # rows of a batch


def speed(reader: SignalsReader, order_R: NDArray[Any]) -> float:
    """Tokens a second of this process' own time, rows in the given order."""
    started = time.process_time()
    for start in range(0, len(order_R), READ_ROWS):
        reader.read(order_R[start : start + READ_ROWS])
    return len(order_R) * reader.row_tokens / (time.process_time() - started)


def forgetful(folder: Path, split: str = "train") -> SignalsReader:
    """A new reader that keeps one decoded block at most, so that no pass finds the work of another done."""
    reader = SignalsReader(folder, split, verify=False)
    reader._memory.blocks.most_bytes = 0
    return reader


def random_passes(folder: Path, split: str, passes: int) -> list[float]:
    """Tokens a second of passes over all rows in random order, as training asks for them; shards are open."""
    speeds = []
    for number in range(passes):
        reader = forgetful(folder, split)
        reader.read([shard.first_row for shard in reader.manifest.splits[split].shards])
        speeds.append(speed(reader, np.random.default_rng(number).permutation(reader.rows)))
    return speeds


def quartiles(values: list[float], digits: int | None = None) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [round(value, digits) for value in values * 2]
    found = statistics.quantiles(values, n=4)
    return [round(found[0], digits), round(found[2], digits)]
