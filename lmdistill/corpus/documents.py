"""Encoded documents side by side on disk, and which of them go where: deduplicated, split by group, shuffled.

Axes: N tokens of all documents one after the other, D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.encode import KEY_BYTES
from lmdistill.corpus.format import TEST, TRAIN, VALID

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """All documents of all sources, in source order; document d is [starts_D[d], starts_D[d + 1])."""

    ids_N: NDArray[np.uint32]
    targets_N: NDArray[np.bool_]  # may this token be a target
    starts_D: NDArray[np.int64]  # D + 1 entries
    text_keys_D: NDArray[np.void]
    group_keys_D: NDArray[np.void]
    success_D: NDArray[np.float32]  # how often models succeed at it; NaN where its source does not say

    def __len__(self) -> int:
        """Number of documents D."""
        return len(self.starts_D) - 1

    @property
    def lengths_D(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.starts_D)


def gather(encoded: Sequence[Any], work: Path) -> Documents:
    """Lay the encoded data sets out flat below `work`, memory-mapped: random order costs no second pass."""
    lengths: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    text_keys, group_keys = [], []
    success: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
    ids_file, targets_file = work / "ids.u32", work / "targets.u8"
    with ids_file.open("wb") as ids_sink, targets_file.open("wb") as targets_sink:
        for data in encoded:
            for chunk in data.data.table.to_batches():
                ids = chunk.column("ids")
                lengths.append(np.asarray(ids.value_lengths(), dtype=np.int64))
                ids.flatten().to_numpy().astype("<u4", copy=False).tofile(ids_sink)
                flat = chunk.column("targets").flatten().to_numpy(zero_copy_only=False)
                flat.astype(np.uint8).tofile(targets_sink)
                text_keys.append(_keys(chunk.column("text_key")))
                group_keys.append(_keys(chunk.column("group_key")))
                success.append(chunk.column("success").to_numpy(zero_copy_only=False))
    starts_D = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    empty = np.zeros(0, np.dtype(f"V{KEY_BYTES}"))
    return Documents(
        ids_N=_mapped(ids_file, np.dtype("<u4")),
        targets_N=_mapped(targets_file, np.dtype(np.bool_)),
        starts_D=starts_D.astype(np.int64),
        text_keys_D=np.concatenate([empty, *text_keys]),
        group_keys_D=np.concatenate([empty, *group_keys]),
        success_D=np.concatenate(success),
    )


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _keys(column: Any) -> NDArray[np.void]:
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.dtype(f"V{KEY_BYTES}"))


def with_targets(documents: Documents) -> Indices:
    """The documents that have at least one target."""
    with_tokens = np.flatnonzero(documents.lengths_D)
    if not len(with_tokens):
        return with_tokens
    return with_tokens[np.logical_or.reduceat(documents.targets_N, documents.starts_D[with_tokens])]


def first_of_each_text(documents: Documents, chosen: Indices) -> Indices:
    """`chosen` without later documents of equal text."""
    if len(chosen) == 0:
        return chosen
    _, first = np.unique(documents.text_keys_D[chosen], return_index=True)
    return chosen[np.sort(first)]


def split_by_group(
    documents: Documents, chosen: Indices, valid_fraction: float, test_fraction: float = 0.0
) -> dict[str, Indices]:
    """`chosen` as train, valid and test: a group whose hash lies below `valid_fraction` is valid, then comes test.

    It depends on the group alone, so that a group never straddles two, and that data added later moves nothing; what is
    valid is so whatever `test_fraction` is. Without one there is no test split.
    """
    bytes_DK = documents.group_keys_D[chosen].view(np.uint8).reshape(-1, KEY_BYTES)
    shares_D = np.ascontiguousarray(bytes_DK[:, :8]).view(">u8").ravel().astype(np.float64) / 2.0**64
    valid_D, train_D = shares_D < valid_fraction, shares_D >= valid_fraction + test_fraction
    splits = {TRAIN: chosen[train_D], VALID: chosen[valid_D]}
    return splits | ({TEST: chosen[~valid_D & ~train_D]} if test_fraction else {})


def shuffled(documents: Documents, chosen: Indices, seed: int) -> Indices:
    """`chosen` in an order that only the seed and the texts decide: by sha256 of both."""
    prefix = hashlib.sha256(f"shuffle {seed}".encode()).digest()
    ranks = [hashlib.sha256(prefix + key.tobytes()).digest()[:8] for key in documents.text_keys_D[chosen]]
    order = np.argsort(np.frombuffer(b"".join(ranks), dtype=">u8"), kind="stable")
    return chosen[order]
