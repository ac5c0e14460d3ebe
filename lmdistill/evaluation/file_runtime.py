"""A file open in its own runtime, as the scorer and the device benchmarks use it.

Axes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lmdistill.deployment.logit_source import LogitSource
from lmdistill.errors import StageError
from lmdistill.evaluation.divergence import log_softmax_in_place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OpenFile(LogitSource, Protocol):
    """What a runtime of lmdistill.deployment offers."""

    def prefill_seconds(self, n: int) -> float:
        """Seconds to read a prompt."""

    def decode_seconds(self, n: int) -> float:
        """Seconds to read tokens one at a time."""

    def close(self) -> None:
        """Give the memory back."""


class FileRuntime:
    """Scores and times an open file."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file

    def log_probs(self, tokens_T: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
        """Log-probabilities [T, V]; raises StageError where the file's vocabulary is smaller."""
        import numpy as np
        import torch

        if self._file.n_vocab < vocab_size:
            raise StageError(f"the file knows {self._file.n_vocab:,} ids, the corpus uses {vocab_size:,}")
        log_probs_TV = np.empty((len(tokens_T), vocab_size), np.float32)
        for start, logits_CV in self._file.logit_chunks(tokens_T.tolist()):
            log_probs_TV[start : start + len(logits_CV)] = logits_CV[:, :vocab_size]
        log_softmax_in_place(torch.from_numpy(log_probs_TV))
        return log_probs_TV

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds to read a prompt of `tokens` tokens."""
        return self._file.prefill_seconds(tokens)

    def decode_seconds(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens one at a time."""
        return self._file.decode_seconds(tokens)

    def close(self) -> None:
        """Free the model and what it has in memory."""
        self._file.close()
