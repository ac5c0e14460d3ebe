"""What a teacher engine is: something that scores rows of tokens with its top-K log-probs.

Axes: B rows, T tokens in a row, K entries of a token.
Engines are named in registry.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.vllm_options import EndpointOptions, VllmOptions


@dataclass(frozen=True)
class TopK:
    """A teacher's predictions for rows [B, T]; position t predicts token t+1."""

    ids_BTK: NDArray[np.int32]  # most likely first; among equals the lower id first
    logp_BTK: NDArray[np.float32]  # exact natural log-probs, descending
    tail_BT: NDArray[np.float32]  # log of the mass outside the K ids; −inf where K is the vocabulary
    lp_next_BT: NDArray[np.float32]  # log-prob of token t+1; NaN at the last position


@dataclass(frozen=True)
class TopKWithHidden(TopK):
    """The same, with the hidden states of L layers that led to it."""

    hidden_BTLD: NDArray[np.float32]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened. `precision` is part of the result, device and threads are not."""

    k: int
    vocab_size: int  # the tokenizer's real size: padding above it takes no mass
    precision: str = "float32"  # float32 | bfloat16
    device: str = "cpu"
    threads: int | None = None
    isolate: bool = False  # rows hold several documents that must not see each other
    finer_products: bool = True  # in float32 where the CPU has no instructions for bfloat16; see precision.py
    load_in: str | None = None  # nf4 | int8: linear layers in so few bits, for engines that can
    hidden_layers: tuple[int, ...] = ()  # hidden states asked for: 0 the embeddings, n what block n gives on
    row_tokens: int = 2048  # the longest row, for engines that must make room for it
    vllm: VllmOptions = field(default_factory=VllmOptions)
    endpoint: EndpointOptions | None = None  # the server that is asked, for engines that ask one


class TeacherEngine(Protocol):
    """Scores tokens. The same rows in the same batch give the same bytes on the same machine."""

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Load the teacher; raises LmdistillError where it cannot do what the options ask."""

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Top-K of every position; `starts_BT` marks first tokens of documents, read where `isolate` is set."""

    def version(self) -> str:
        """The engine's packages with their versions, for the manifest."""
