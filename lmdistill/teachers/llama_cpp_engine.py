"""The llama_cpp engine: a GGUF teacher scored by llama.cpp itself, as quantised as its file is.

Axes: B rows, T tokens in a row, N = B·T tokens, C tokens of one chunk, V vocabulary.
llama.cpp quantises activations to 8 bits wherever weights are quantised, so its log-probs are those of the model that
its users run, not those of the dequantised weights; `PARITY_BOUNDS` says how far the two lie apart.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.deployment.gguf_header import read_tensors
from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.chunks import Chunks, reduce_chunks
from lmdistill.teachers.engine import EngineOptions, TopK
from lmdistill.teachers.registry import engine

# nats: the largest |Δ log-prob| that a file's types explain, from transformers in float32 on the same weights:
# beside f16 and bf16 weights activations are rounded alike, beside all others to 8 bits in blocks; docs/signals.md
PARITY_BOUNDS = {"f32": 0.01, "f16": 0.1, "bf16": 1.0}
QUANTISED_BOUND = 3.0
BATCH = 512  # tokens evaluated at once, llama.cpp's own default; bounds memory to BATCH · V floats


def need_gguf(teacher: ModelRef) -> Path:
    """The GGUF file that the teacher was given as; raises PreflightError where it is a folder of float weights."""
    if teacher.gguf is None:
        raise PreflightError(
            f"the llama_cpp engine scores a GGUF file; the teacher {teacher.source or teacher.name} is a model folder",
            why="an export would be another teacher: its file type and its digest are for the recipe to say",
            fix="use `engine: transformers`, or export the model to GGUF first and name that file as the teacher",
        )
    return teacher.gguf


def weight_type(gguf: Path) -> str:
    """The type of most of the file's weights (`f32`, `q4_1`, `q6_k` …): the precision that its teacher has."""
    weights: Counter[str] = Counter()
    for tensor in read_tensors(gguf).values():
        weights[tensor.type] += tensor.weights
    return weights.most_common(1)[0][0]


def parity_bound(gguf: Path) -> float:
    """The bound that the file's coarsest type explains, in nats."""
    return max(PARITY_BOUNDS.get(tensor.type, QUANTISED_BOUND) for tensor in read_tensors(gguf).values())


@engine("llama_cpp")
class LlamaCppEngine:
    """Any GGUF that llama.cpp runs, on the CPU; keys and values are kept in float32."""

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Load the file; raises LmdistillError where the teacher is no GGUF or its vocabulary is short."""
        self._options = options
        self._runtime = LlamaCppRuntime(
            need_gguf(teacher), n_ctx=options.row_tokens, n_batch=BATCH, n_threads=options.threads, exact=True
        )
        if self._runtime.n_vocab < options.vocab_size:
            raise LmdistillError(
                f"teacher {teacher.name} has logits for {self._runtime.n_vocab} ids, its tokenizer "
                f"{options.vocab_size}",
                why="tokens without a logit cannot be scored",
                fix="use the tokenizer this model was trained with",
            )

    def version(self) -> str:
        """llama-cpp-python, and torch, which reduces the logits."""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("llama-cpp-python", "torch"))

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Top-K of every position of the rows, each chunk reduced where llama.cpp left it."""
        return reduce_chunks(self.logit_chunks(tokens_BT, starts_BT), tokens_BT, self._options.k)

    def logit_chunks(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> Chunks:
        """Logits of all N tokens: each row, or with `isolate` each document, is a sequence and a decode of its own.

        Sequences in one cache change each other's last bits, which quantised activations make large: 1.5 in a logit
        of SmolLM2 in Q4_1; alone, what stands before a document cannot reach it.
        """
        import torch

        length = tokens_BT.shape[1]
        for row, tokens_T in enumerate(tokens_BT):
            starts = np.flatnonzero(starts_BT[row]) if self._options.isolate else np.zeros(0, int)
            cuts = np.unique(np.concatenate([[0], starts, [length]]))
            for first, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                for at, logits_CV in self._runtime.logit_chunks(tokens_T[first:stop].tolist(), copy=False):
                    yield row * length + first + at, torch.from_numpy(logits_CV)[:, : self._options.vocab_size]
