"""Full-vocabulary log-probabilities of a teacher or parent, kept on disk so that each model is loaded alone.

Axes: N predictions, V vocabulary. The file is raw little-endian float32 [N, V]; its name appears when it is whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lmdistill.errors import IntegrityError

if TYPE_CHECKING:
    import torch

ITEM = np.dtype("<f4")


def reference_bytes(predictions: int, vocab_size: int) -> int:
    """Size of one reference on disk."""
    return predictions * vocab_size * ITEM.itemsize


class ReferenceWriter:
    """Appends log-probabilities [n, V]; leaving the `with` block without an error publishes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_suffix(".partial")
        self._file: BinaryIO

    def __enter__(self) -> ReferenceWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        return self

    def append(self, log_probs_NV: torch.Tensor) -> None:
        """Write the next predictions."""
        self._file.write(np.ascontiguousarray(log_probs_NV.numpy(), dtype=ITEM).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._partial.replace(self.path)


class Reference:
    """Reads a reference back, some predictions at a time."""

    def __init__(self, path: Path, predictions: int, vocab_size: int) -> None:
        found, wanted = path.stat().st_size, reference_bytes(predictions, vocab_size)
        if found != wanted:
            raise IntegrityError(f"{path} has {found:,} bytes where {wanted:,} belong", fix="delete it and run again")
        self._array_NV = np.memmap(path, dtype=ITEM, mode="r", shape=(predictions, vocab_size))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of predictions `start` to `stop`."""
        import torch

        return torch.from_numpy(np.array(self._array_NV[start:stop]))
