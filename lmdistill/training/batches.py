"""Which rows a training sees in which step: so many rows a step, or so many tokens.

Axes: N rows trained on, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lmdistill.training.config import DistillConfig
from lmdistill.training.data import RowDataset, row_order
from lmdistill.training.ranks import Ranks
from lmdistill.training.token_batches import BatchDataset, Lengths, row_lengths, token_batches

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Batches:
    """A training's data in its order, and how a step of it is cut up."""

    dataset: Dataset[Any]
    order_N: Order  # row numbers, in the order that they are trained on
    micro: int  # of the dataset's items, those a process takes at once
    accumulated: int  # times a process does so in a step
    tokens_S: Lengths  # of every step

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.tokens_S)

    def tokens_after(self, steps: int) -> int:
        """Tokens of the first so many steps."""
        return int(self.tokens_S[:steps].sum())


def batches_of(reader: Any, config: DistillConfig, ranks: Ranks, ordered: Callable[[int], Order]) -> Batches:
    """The training's data as the configuration asks for it; `ordered` gives the rows of so many steps of equal rows."""
    if config.batch_tokens:
        return _by_tokens(reader, config, config.batch_tokens, ranks)
    per_step = config.batch_rows * reader.row_tokens
    steps = max(1, config.tokens // per_step)
    order_N = ordered(steps)
    micro, accumulated = ranks.share_of(config.batch_rows, config.micro_rows)
    return Batches(RowDataset(order_N), order_N, micro, accumulated, np.full(steps, per_step, np.int64))


def _by_tokens(reader: Any, config: DistillConfig, batch_tokens: int, ranks: Ranks) -> Batches:
    """Steps of tokens; `micro_rows` full rows of them go at once, where it is set."""
    lengths_R = row_lengths(reader)
    most = max(1, config.tokens // batch_tokens)
    epochs = -(-most * batch_tokens // int(lengths_R.sum())) + 1
    order_N = row_order(reader.rows, epochs * reader.rows, config.seed)
    at_once = config.micro_rows * reader.row_tokens if config.micro_rows else batch_tokens
    accumulated = -(-batch_tokens // (at_once * ranks.processes))
    found = token_batches(order_N.tolist(), lengths_R, batch_tokens, accumulated * ranks.processes, most)
    rows = sum(map(len, found.batches))
    return Batches(BatchDataset(found.batches), order_N[:rows], 1, accumulated, found.tokens_S)
