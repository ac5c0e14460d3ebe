"""Batches for distillation: rows of the teacher cache in a seeded order, decoded when they are needed.

Axes: R rows of a batch, T tokens in a row, K entries of a token, N positions whose prediction counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lmdistill.corpus.format import DOC_START, LOSS, document_positions
from lmdistill.signals.integrity import unknown_next
from lmdistill.signals.reader import SignalsBatch, SignalsReader
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.token_batches import cut


def row_order(rows: int, wanted: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`wanted` row numbers: seeded permutations of all rows, one after the other."""
    generator = np.random.default_rng(seed)
    epochs = -(-wanted // rows)
    return np.concatenate([generator.permutation(rows) for _ in range(epochs)])[:wanted].astype(np.int64)


class RowDataset(Dataset[int]):  # type: ignore[misc]
    """The row numbers a training run sees, in the order it sees them."""

    def __init__(self, order: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> int:
        return int(self.order[index])


class SignalsCollator:
    """Row numbers → one batch of tensors; every read proves that the log-probs belong to the tokens.

    `short` cuts the batch to its longest row.
    """

    def __init__(self, reader: SignalsReader | CorpusRows, isolate: bool, short: bool = False) -> None:
        self.reader, self.isolate, self.short = reader, isolate, short
        self.need_next = False  # whether weights of tokens ask for the teacher's log-probs of the text

    def __call__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows as tensors, with position ids where packing isolates documents and a row has several."""
        batch = self.reader.read(list(rows))
        if self.short:
            batch = cut(batch)
        inputs = to_inputs(batch)
        if self.need_next:
            inputs["teacher_next"] = _next_of(batch, self.reader)
        starts_RT = (batch.flags_RT & DOC_START) > 0
        if self.isolate and starts_RT[:, 1:].any():
            inputs["position_ids"] = torch.from_numpy(document_positions(starts_RT))
        return inputs


def _next_of(batch: SignalsBatch, reader: SignalsReader | CorpusRows) -> torch.Tensor:
    """The teacher's log-probs of the tokens that follow `[R, T]`; IntegrityError where one that counts is not known."""
    if np.isnan(batch.lp_next_RT[(batch.flags_RT & LOSS) > 0]).any():
        raise unknown_next(reader.folder, "set no `token_weights`")
    return torch.from_numpy(batch.lp_next_RT)


def to_inputs(batch: SignalsBatch) -> dict[str, torch.Tensor]:
    """Tensors of a decoded batch; `labels` are −100 where a prediction does not count, as Trainer counts them.

    `counted` numbers the others, so that no device has to find them.
    """
    tokens_RT = torch.from_numpy(batch.tokens_RT.astype(np.int64))
    counts_RT = torch.from_numpy((batch.flags_RT & LOSS) > 0)
    labels_RT = torch.full_like(tokens_RT, -100)
    labels_RT[:, :-1] = tokens_RT[:, 1:].where(counts_RT[:, :-1], -100)
    weights = {} if batch.weight_RTK is None else {"teacher_weight": torch.from_numpy(batch.weight_RTK)}
    return {
        **weights,
        "input_ids": tokens_RT,
        "labels": labels_RT,
        "counted": (labels_RT != -100).flatten().nonzero()[:, 0],
        "teacher_ids": torch.from_numpy(batch.ids_RTK),
        "teacher_logp": torch.from_numpy(batch.logp_RTK),
        "teacher_tail": torch.from_numpy(batch.tail_RT),
    }
