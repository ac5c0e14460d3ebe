"""The llama.cpp runtime: a GGUF file, through lmdistill.deployment.

Axes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.errors import StageError
from lmdistill.evaluation.divergence import log_softmax_in_place
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime

BATCH = 512  # tokens evaluated at once, llama.cpp's own default for its micro-batch


@runtime("llama.cpp")
class GgufRuntime:
    """A GGUF file open in llama.cpp on the CPU."""

    def __init__(self, llama: LlamaCppRuntime) -> None:
        self._llama = llama

    @staticmethod
    def missing() -> str | None:
        """The package to install, where it is not there."""
        return None if importlib.util.find_spec("llama_cpp") else "pip install 'lmdistill[gguf]'"

    @staticmethod
    def open(path: Path, options: RuntimeOptions, *, exact: bool) -> GgufRuntime:
        """Open the file; `exact` keeps keys and values in 32 bits and leaves flash attention off."""
        from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime

        return GgufRuntime(
            LlamaCppRuntime(path, n_ctx=options.context, n_batch=BATCH, n_threads=options.threads, exact=exact)
        )

    def log_probs(self, tokens_T: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
        """Log-probabilities [T, V]; raises StageError where the file's vocabulary is smaller."""
        import numpy as np
        import torch

        if self._llama.n_vocab < vocab_size:
            raise StageError(f"the file knows {self._llama.n_vocab:,} ids, the corpus uses {vocab_size:,}")
        log_probs_TV = np.empty((len(tokens_T), vocab_size), np.float32)
        for start, logits_CV in self._llama.logit_chunks(tokens_T.tolist()):
            log_probs_TV[start : start + len(logits_CV)] = logits_CV[:, :vocab_size]
        log_softmax_in_place(torch.from_numpy(log_probs_TV))
        return log_probs_TV

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds to read a prompt of `tokens` tokens."""
        return self._llama.prefill_seconds(tokens)

    def decode_seconds(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens one at a time."""
        return self._llama.decode_seconds(tokens)

    def close(self) -> None:
        """Free the model and its context."""
        self._llama.close()
