"""A GGUF file in llama.cpp: logits for scoring, token ids, and the time prefill and decode take.

Thin on purpose: the low-level API of llama-cpp-python, one sequence, no sampling. Two ways to open a file:
`exact=True` (32-bit K/V cache, no flash attention, tensors validated) for parity and scores, and the default,
what a user's llama.cpp does, for speed.

Axes: T tokens of one sequence, C tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lmdistill.errors import IntegrityError, LmdistillError, PreflightError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

_WARNING, _ERROR = 3, 4  # ggml's log levels
_log_lines: deque[str] = deque(maxlen=50)
_log_callback: Any = None  # llama.cpp keeps only a pointer: the callback must outlive every model


def llama_library() -> Any:
    """llama-cpp-python's low-level module, its log collected instead of printed.

    Raises PreflightError where the package is not installed or its library does not load.
    """
    global _log_callback
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise PreflightError(
            "llama.cpp is not available", why=str(error), fix="pip install 'lmdistill[gguf]' (llama-cpp-python)"
        ) from error
    if _log_callback is None:

        def collect(level: int, text: bytes, _user_data: Any) -> None:
            if level in (_WARNING, _ERROR):
                _log_lines.append(text.decode("utf-8", "replace").rstrip())

        _log_callback = llama_cpp.llama_log_callback(collect)
        llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    return llama_cpp


def take_log() -> list[str]:
    """llama.cpp's warnings and errors since the last call."""
    lines = list(_log_lines)
    _log_lines.clear()
    return lines


def default_threads() -> int:
    """The physical cores this process may use; all it may use where psutil is not there to tell (a phone)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if importlib.util.find_spec("psutil") is None:
        return usable
    import psutil

    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


class LlamaCppRuntime:
    """One GGUF file, open in llama.cpp; a context manager.

    `n_ctx` is the longest sequence in tokens, `n_batch` the tokens evaluated at once (and the size C of a chunk
    of logits), `n_threads` defaults to the physical cores. Raises IntegrityError where the file does not load.
    """

    def __init__(
        self, path: Path, *, n_ctx: int = 2048, n_batch: int = 512, n_threads: int | None = None, exact: bool = False
    ) -> None:
        self.path, self.n_ctx, self.n_batch = path, n_ctx, min(n_batch, n_ctx)
        self.n_threads = n_threads or default_threads()
        self._lib = llama_library()
        self._model: Any = None
        self._ctx: Any = None
        self._batch: Any = None
        if not path.is_file():
            raise LmdistillError(f"no such file: {path}", fix="check the path of the GGUF file")
        try:
            self._open(exact)
        except BaseException:
            self.close()
            raise

    def _open(self, exact: bool) -> None:
        lib = self._lib
        take_log()
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.check_tensors = exact
        self._model = lib.llama_model_load_from_file(os.fsencode(self.path), model_params)
        if not self._model:
            why = "; ".join(line for line in take_log() if line) or "llama.cpp gives no reason"
            raise IntegrityError(f"llama.cpp cannot load {self.path}", why=why, fix="export the file again")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.n_ctx, self.n_batch, self.n_batch
        params.n_threads = params.n_threads_batch = self.n_threads
        if exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._ctx = lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise LmdistillError(
                f"llama.cpp cannot make a context of {self.n_ctx} tokens for {self.path}", why="; ".join(take_log())
            )
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._batch = lib.llama_batch_init(self.n_batch, 0, 1)

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._ctx:
            self._lib.llama_free(self._ctx)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._batch = self._ctx = self._model = None

    @property
    def n_vocab(self) -> int:
        """V, the number of tokens in the file's vocabulary."""
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    @property
    def n_params(self) -> int:
        """The number of weights in the file."""
        return int(self._lib.llama_model_n_params(self._model))

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of bos, eos and eot as llama.cpp uses them; -1 where there is none."""
        lib, vocab = self._lib, self._vocab
        return {name: int(getattr(lib, f"llama_vocab_{name}")(vocab)) for name in ("bos", "eos", "eot")}

    def ends_generation(self, token: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def token_text(self, token: int) -> str:
        """What the vocabulary says a token is: special tokens as they are written in a template; "" where token < 0."""
        return "" if token < 0 else self._lib.llama_vocab_get_text(self._vocab, token).decode("utf-8")

    @property
    def chat_template(self) -> str | None:
        """The chat template embedded in the file."""
        template: bytes | None = self._lib.llama_model_chat_template(self._model, None)
        return None if template is None else template.decode("utf-8")

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds BOS/EOS as the file says, `parse_special` reads `<|…|>` as tokens."""
        raw = text.encode("utf-8")
        size = len(raw) + 8  # a token is at least one byte; BOS and EOS come on top
        ids = (self._lib.llama_token * size)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, size, add_special, parse_special)
        if count < 0:
            raise LmdistillError(f"llama.cpp could not tokenise a text of {len(raw)} bytes with {self.path}")
        return list(ids[:count])

    def reset(self) -> None:
        """Forget the sequence so far: the K/V cache and the convolutions' state."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)

    def _evaluate(self, tokens_C: Sequence[int], start: int, *, all_logits: bool) -> None:
        """Run `tokens_C` at positions start…, keeping the logits of all of them or of the last."""
        batch = self._batch
        batch.n_tokens = len(tokens_C)
        for i, token in enumerate(tokens_C):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == len(tokens_C) - 1
        status = self._lib.llama_decode(self._ctx, batch)
        if status != 0:
            why = "; ".join(take_log())
            raise LmdistillError(f"llama.cpp failed on {self.path} (status {status}, position {start})", why=why)

    def logit_chunks(self, tokens_T: Sequence[int], *, copy: bool = True) -> Iterator[tuple[int, Logits]]:
        """Yield (start, logits `[C, V]`) over one sequence: row i predicts token start + i + 1.

        Memory is bounded by n_batch · V floats; the array is the caller's, or with `copy=False` llama.cpp's own, which
        the next chunk overwrites. Raises LmdistillError where T > n_ctx or an id is outside the vocabulary.
        """
        import numpy as np

        ids_T = [int(token) for token in tokens_T]
        if len(ids_T) > self.n_ctx:
            raise LmdistillError(f"a sequence of {len(ids_T)} tokens does not fit n_ctx={self.n_ctx}")
        V = self.n_vocab
        if ids_T and not 0 <= min(ids_T) <= max(ids_T) < V:
            raise LmdistillError(
                f"token ids {min(ids_T)}…{max(ids_T)} are outside the vocabulary of {V} in {self.path}"
            )
        self.reset()
        for start in range(0, len(ids_T), self.n_batch):
            tokens_C = ids_T[start : start + self.n_batch]
            self._evaluate(tokens_C, start, all_logits=True)
            pointer = self._lib.llama_get_logits(self._ctx)
            logits_CV = np.ctypeslib.as_array(pointer, shape=(len(tokens_C), V))
            yield start, logits_CV.copy() if copy else logits_CV

    def logits(self, tokens_T: Sequence[int]) -> Logits:
        """Logits `[T, V]` of one sequence; row i predicts token i + 1."""
        import numpy as np

        chunks = [chunk_CV for _, chunk_CV in self.logit_chunks(tokens_T)]
        return np.concatenate(chunks) if chunks else np.zeros((0, self.n_vocab), np.float32)

    def prefill_seconds(self, n: int) -> float:
        """Seconds to evaluate a prompt of `n` tokens from an empty context, logits of the last token only."""
        ids_T = self._pseudo_tokens(n)
        self.reset()
        begin = time.perf_counter()
        for start in range(0, n, self.n_batch):
            self._evaluate(ids_T[start : start + self.n_batch], start, all_logits=False)
        self._lib.llama_synchronize(self._ctx)
        return time.perf_counter() - begin

    def decode_seconds(self, n: int) -> float:
        """Seconds to evaluate `n` tokens one after the other from an empty context, as in generation."""
        ids_T = self._pseudo_tokens(n)
        self.reset()
        begin = time.perf_counter()
        for position, token in enumerate(ids_T):
            self._evaluate([token], position, all_logits=True)
            self._lib.llama_synchronize(self._ctx)
        return time.perf_counter() - begin

    def _pseudo_tokens(self, n: int) -> list[int]:
        """The same `n` scattered ids on every call: what the ids are does not change the work."""
        if n > self.n_ctx:
            raise LmdistillError(f"{n} tokens do not fit n_ctx={self.n_ctx}")
        return [(7919 * i + 101) % self.n_vocab for i in range(n)]
