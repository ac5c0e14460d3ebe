"""A `.pte` in ExecuTorch: logits for scoring and generation, and the time prefill and decode take.

A sequence starts at position 0 and that alone forgets the one before: the mask lets no token see what was not written
since, and the program drops its convolutions' state there.

Axes: S tokens of a call, P positions they see, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lmdistill.deployment.llama_cpp_runtime import default_threads
from lmdistill.errors import IntegrityError, LmdistillError, PreflightError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

METHOD = "forward"  # the one method of a program
UNSEEN = -1e9  # added to a score, so that its weight is 0; an infinity would make NaN of a row without any other
INSTALL = "pip install 'lmdistill[executorch]'"


def executorch_runtime() -> Any:
    """ExecuTorch's runtime with its XNNPACK backend and quantised operators; raises PreflightError without them."""
    try:
        with unwarned():
            import executorch.kernels.quantized  # noqa: F401  (registers the embedding of few bits)
            from executorch.runtime import Runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise PreflightError("ExecuTorch is not available", why=str(error), fix=INSTALL) from error
    runtime = Runtime.get()
    if not runtime.backend_registry.is_available("XnnpackBackend"):
        raise PreflightError("this build of ExecuTorch has no XNNPACK", fix=INSTALL)
    return runtime


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Without what ExecuTorch, torchao and torch warn of each other: no user can do anything about it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class ExecutorchRuntime:
    """One `.pte`, open; a context manager. Raises IntegrityError where it does not load."""

    def __init__(self, path: Path, *, n_threads: int | None = None) -> None:
        if not path.is_file():
            raise LmdistillError(f"no such file: {path}", fix="check the path of the .pte file")
        runtime = executorch_runtime()
        from executorch.extension.pybindings import portable_lib

        self.path, self.n_threads = path, n_threads or default_threads()
        portable_lib._unsafe_reset_threadpool(self.n_threads)  # the only setter there is; for the whole process
        try:
            self._program: Any = runtime.load_program(path)
            self._method: Any = self._program.load_method(METHOD)
            self.context, self.chunk, self.n_vocab = (
                int(self._program.load_method(name).execute(())[0]) for name in ("context", "chunk", "vocab_size")
            )
        except (RuntimeError, KeyError) as error:
            raise IntegrityError(
                f"ExecuTorch cannot load {path}", why=str(error).strip(), fix="export the file again with this version"
            ) from error

    def __enter__(self) -> ExecutorchRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._method = self._program = None

    def evaluate(self, tokens_S: Sequence[int], start: int, *, all_logits: bool) -> Any:
        """Logits `[S, V]` or `[1, V]` (a torch tensor) of the tokens at positions start…; at 0 a sequence begins."""
        import torch

        S = len(tokens_S)
        positions_S = torch.arange(start, start + S)
        mask_SP = torch.zeros(S, start + S)
        if S > 1:
            mask_SP[:, start:].masked_fill_(torch.ones(S, S, dtype=torch.bool).triu_(1), UNSEEN)
        wanted_N = torch.arange(S) if all_logits else torch.tensor([S - 1])
        try:
            outputs = self._method.execute((torch.tensor(tokens_S, dtype=torch.long), positions_S, mask_SP, wanted_N))
        except RuntimeError as error:
            raise LmdistillError(f"ExecuTorch failed on {self.path} at position {start}", why=str(error)) from error
        return outputs[0]

    def read(self, tokens_T: Sequence[int], start: int = 0) -> Any:
        """Logits `[V]` after a prompt, by chunks."""
        logits_NV = None
        for at in range(0, len(tokens_T), self.chunk):
            logits_NV = self.evaluate(tokens_T[at : at + self.chunk], start + at, all_logits=False)
        assert logits_NV is not None  # no caller has an empty prompt
        return logits_NV[0]

    def logit_chunks(self, tokens_T: Sequence[int]) -> Iterator[tuple[int, Logits]]:
        """Yield (start, logits `[C, V]`) over one sequence: row i predicts token start + i + 1."""
        ids_T = [int(token) for token in tokens_T]
        if len(ids_T) > self.context:
            raise LmdistillError(
                f"a sequence of {len(ids_T)} tokens does not fit the {self.context} positions of {self.path.name}",
                fix="export it again with a larger `context`",
            )
        if ids_T and not 0 <= min(ids_T) <= max(ids_T) < self.n_vocab:
            raise LmdistillError(
                f"token ids {min(ids_T)}…{max(ids_T)} are outside the vocabulary of {self.n_vocab} in {self.path}"
            )
        for start in range(0, len(ids_T), self.chunk):
            logits_CV = self.evaluate(ids_T[start : start + self.chunk], start, all_logits=True)
            yield start, logits_CV.numpy().copy()

    def prefill_seconds(self, n: int) -> float:
        """Seconds to evaluate a prompt of `n` tokens from an empty context, logits of each chunk's last token only."""
        ids_T = self._pseudo_tokens(n)
        begin = time.perf_counter()
        self.read(ids_T)
        return time.perf_counter() - begin

    def decode_seconds(self, n: int) -> float:
        """Seconds to evaluate `n` tokens one after the other from an empty context, as in generation."""
        ids_T = self._pseudo_tokens(n)
        begin = time.perf_counter()
        for position, token in enumerate(ids_T):
            self.evaluate([token], position, all_logits=True)
        return time.perf_counter() - begin

    def _pseudo_tokens(self, n: int) -> list[int]:
        """The same `n` scattered ids on every call: what the ids are does not change the work."""
        if n > self.context:
            raise LmdistillError(f"{n} tokens do not fit the {self.context} positions of {self.path.name}")
        return [(7919 * i + 101) % self.n_vocab for i in range(n)]
