"""Whole caches read as they are stored: coded rows by shard, each shard's bytes proven before its first row.

Axes: R rows, T tokens in a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DIGEST_ROWS, digest_of_blocks
from lmdistill.errors import IntegrityError
from lmdistill.signals import coded
from lmdistill.signals import variant as variants
from lmdistill.signals.format import (
    Layout,
    Manifest,
    ShardEntry,
    SplitEntry,
    bytes_per_token,
    find_folder,
    load_manifest,
    record_name,
)
from lmdistill.signals.hidden_files import hidden_name, hidden_problems
from lmdistill.signals.integrity import shard_problems
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.writer import ShardRecord

CHUNK_BYTES = 2**24  # of coded rows and their hidden states at a time


@dataclass(frozen=True)
class Chunk:
    """Some rows of a shard, in order."""

    raw_R: NDArray[Any]  # coded rows
    hidden_R: NDArray[Any] | None  # their stored hidden states, where there are any

    def kept(self, keep_R: NDArray[np.bool_]) -> Chunk:
        """The rows that are marked."""
        return Chunk(self.raw_R[keep_R], None if self.hidden_R is None else self.hidden_R[keep_R])


class Cache:
    """A whole cache in `folder` (an artefact or its out/)."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        """`manifest` stands in for one that is not written yet."""
        self.folder = folder if manifest else find_folder(folder)
        self.manifest = manifest or load_manifest(self.folder)
        self._records: dict[str, dict[str, Any]] = {}

    @property
    def layout(self) -> Layout:
        """How its rows are stored."""
        return self.manifest.layout

    def record(self, shard: ShardEntry) -> dict[str, Any]:
        """A shard's record; raises IntegrityError where shard or record is damaged. Bytes are read once."""
        if shard.file in self._records:
            return self._records[shard.file]
        problems = shard_problems(self.folder, shard, self.layout) + hidden_problems(self.folder, shard, self.layout)
        if problems:
            raise IntegrityError(
                f"shard {shard.file} of {self.folder} is damaged",
                why="; ".join(problems[:4]),
                fix="make that cache whole first: run the stage or command that wrote it again",
            )
        record: dict[str, Any] = json.loads((self.folder / record_name(shard.file)).read_bytes())
        self._records[shard.file] = record
        return record

    def chunks(self, shard: ShardEntry) -> Iterator[Chunk]:
        """A shard's rows as they are stored; its bytes are the caller's to check, with `record`."""
        variant = variants.get(self.layout.variant)
        dtype, hidden = variant.dtype(self.layout), self._hidden(shard)
        stored = variant.open(self.folder / shard.file, self.layout, shard.rows, variants.Memory())
        beside = 0 if hidden is None else hidden.itemsize
        step = max(1, CHUNK_BYTES // (dtype.itemsize + beside))
        for first in range(0, shard.rows, step):
            rows = range(first, min(first + step, shard.rows))
            raw = np.empty((len(rows), dtype.itemsize), np.uint8)
            stored.copy_rows(rows, [*raw])
            yield Chunk(raw.view(dtype)[:, 0], None if hidden is None else hidden[rows.start : rows.stop])

    def _hidden(self, shard: ShardEntry) -> NDArray[Any] | None:
        if self.layout.hidden is None:
            return None
        dtype = self.layout.hidden.row_dtype(self.layout.row_tokens)
        rows: NDArray[Any] = np.memmap(self.folder / hidden_name(shard.file), dtype, mode="r")
        return rows

    def tokens(self, shards: Sequence[ShardEntry]) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
        """Tokens and flags of shards, chunk by chunk."""
        for shard in shards:
            for chunk in self.chunks(shard):
                yield tokens_of(self.layout, chunk.raw_R)

    def corpus_digest(self, split: str) -> str:
        """The digest of a split's tokens and flags, from the rows themselves."""
        entry = self.manifest.splits[split]
        return rows_digest(entry.rows, self.layout.row_tokens, self.tokens(entry.shards))


def keeps_top_k(variant: str) -> bool:
    """Whether rows of a variant are the teacher's K most likely, coded as all such variants code them."""
    return type(variants.get(variant)).code is variants.Variant.code


def tokens_of(layout: Layout, raw_R: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Tokens and flags `[R, T]` of coded rows."""
    return coded.joined(layout, raw_R, "token").astype(np.uint32), raw_R["flags"].copy()


def rows_digest(rows: int, row_tokens: int, chunks: Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]) -> str:
    """What a corpus of these rows has as its split's digest; the rows are never held together."""
    return digest_of_blocks((rows, row_tokens), _blocks(chunks))


def _blocks(chunks: Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The same rows, DIGEST_ROWS at a time."""
    tokens, flags, have = list[NDArray[Any]](), list[NDArray[np.uint8]](), 0
    for tokens_RT, flags_RT in chunks:
        while len(tokens_RT):
            taken = slice(0, DIGEST_ROWS - have)
            tokens.append(tokens_RT[taken])
            flags.append(flags_RT[taken])
            have += len(tokens[-1])
            tokens_RT, flags_RT = tokens_RT[taken.stop :], flags_RT[taken.stop :]
            if have == DIGEST_ROWS:
                yield np.concatenate(tokens), np.concatenate(flags)
                tokens, flags, have = [], [], 0
    if have:
        yield np.concatenate(tokens), np.concatenate(flags)


def split_entry(layout: Layout, corpus_digest: str, records: Sequence[ShardRecord]) -> SplitEntry:
    """What the manifest says of a split of these shards.

    Where `lp_next` is not known everywhere, the mean over what is known would be too good: there is no teacher's loss.
    """
    statistics, entries = Statistics(), tuple(record.entry for record in records)
    for record in records:
        statistics.merge(record.statistics)
    rows = sum(entry.rows for entry in entries)
    figures = statistics.summary(bytes_per_token(layout, entries))
    return SplitEntry(rows, corpus_digest, entries, figures | ({"teacher_nll": None} if layout.open_next else {}))
