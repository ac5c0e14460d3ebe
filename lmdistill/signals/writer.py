"""Writes one shard of the teacher cache: encode, checksum, then commit at once or not at all.

Axes: R rows of a batch, T tokens in a row, K entries of a token.
A shard is written under another name, fsynced and renamed; its record (`<shard>.json`) follows in the same way and
is the proof that the shard is complete. Any number of processes may write different shards of one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import tokens_digest
from lmdistill.errors import StageError
from lmdistill.pipeline.files import write_text
from lmdistill.signals import variant as variants
from lmdistill.signals.alignment import Misaligned
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.format import (
    FORMAT_VERSION,
    Layout,
    ShardEntry,
    TeacherInfo,
    canonical_json,
    record_name,
    sha256_of,
    shard_name,
)
from lmdistill.signals.hidden_files import HiddenWriter, hidden_problems
from lmdistill.signals.integrity import shard_problems
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.truncation import truncate
from lmdistill.teachers.engine import TopK


@dataclass(frozen=True)
class ShardJob:
    """The unit of work: rows [first_row, first_row + rows) of a split."""

    split: str
    index: int
    first_row: int
    rows: int

    @property
    def file(self) -> str:
        """The shard's file name."""
        return shard_name(self.split, self.index)

    @property
    def span(self) -> slice:
        """Its rows in the split."""
        return slice(self.first_row, self.first_row + self.rows)


def plan_shards(split: str, rows: int, shard_rows: int) -> list[ShardJob]:
    """Cut a split's rows into shards of `shard_rows`; the last may be shorter."""
    firsts = range(0, rows, shard_rows)
    return [ShardJob(split, index, first, min(shard_rows, rows - first)) for index, first in enumerate(firsts)]


@dataclass(frozen=True)
class ShardRecord:
    """The `.json` beside a shard: what was written, block by block, for which tokens, by which teacher."""

    entry: ShardEntry
    statistics: Statistics


def source_digest(layout: Layout, teacher: TeacherInfo, tokens_RT: NDArray[Any], flags_RT: NDArray[Any]) -> str:
    """Identity of what a shard is made from: a finished shard is kept only where this is the same."""
    spec = {"format": FORMAT_VERSION, "layout": layout.fields, "teacher": teacher.fields}
    return sha256_of(canonical_json({**spec, "tokens": tokens_digest(tokens_RT, flags_RT)}).encode())


def finished_shard(folder: Path, job: ShardJob, layout: Layout, source: str) -> tuple[ShardRecord | None, list[str]]:
    """The record of a shard that is there, whole, and made from `source`; else None and why it must be made."""
    path = folder / record_name(job.file)
    if not path.exists():
        return None, []
    try:
        fields = json.loads(path.read_bytes())
        entry = _entry(fields, path.read_bytes())
        statistics = Statistics(**fields["statistics"])
    except (ValueError, KeyError, TypeError) as error:
        return None, [f"{path.name}: not a shard's record: {error!r}"]
    if fields["source"] != source or (entry.first_row, entry.rows) != (job.first_row, job.rows):
        return None, [f"{job.file}: made from other tokens, another teacher or other settings"]
    problems = shard_problems(folder, entry, layout) + hidden_problems(folder, entry, layout)
    return (None, problems) if problems else (ShardRecord(entry, statistics), [])


def _entry(fields: dict[str, Any], record: bytes) -> ShardEntry:
    named = {name: fields[name] for name in ("file", "first_row", "rows", "bytes", "sha256")}
    return ShardEntry(**named, record_sha256=sha256_of(record))


class ShardWriter:
    """Writes the rows of one job in order. Raises StageError where the disk is full or the engine's output unfit.

    Writers of one shard at the same time, each with a `writer_id` of its own, end with the same bytes: what the last
    one wrote takes the name.
    """

    def __init__(self, folder: Path, job: ShardJob, layout: Layout, source: str, writer_id: str = "") -> None:
        self.folder, self.job, self.layout, self.source = folder, job, layout, source
        self._writer_id = writer_id
        self.statistics = Statistics()
        self._variant = variants.get(layout.variant)
        self._packer = self._variant.packer(layout)
        self._sha, self._crcs, self._rows, self._bytes = hashlib.sha256(), list[int](), 0, 0
        self._file: BinaryIO | None = None
        self._hidden = HiddenWriter(folder, job.file, layout.hidden, writer_id) if layout.hidden else None

    def append(self, tokens_RT: NDArray[Any], flags_RT: NDArray[np.uint8], exact: TopK) -> None:
        """Encode and write the next rows."""
        check_engine_output(exact, self.layout)
        self._append_hidden(exact)
        exact = truncate(exact, self.layout)
        raw_R = self._variant.code(self.layout, tokens_RT, flags_RT, exact)
        decoded = self._empty(len(raw_R))
        self.refuse(self._variant.decode(self.layout, raw_R, decoded))
        self.statistics.add(tokens_RT, flags_RT, exact, decoded.logp_RTK, decoded.tail_RT)
        self.append_coded(raw_R)

    def append_coded(self, raw_R: NDArray[Any], hidden_R: NDArray[Any] | None = None) -> None:
        """Write rows that are coded already, and their hidden states; their statistics are the caller's."""
        try:
            if hidden_R is not None and self._hidden is not None:
                self._hidden.append_coded(hidden_R)
        except OSError as error:
            raise self._disk_error(error) from error
        self._write(self._packer.add(raw_R))
        self._rows += len(raw_R)

    def _empty(self, rows: int) -> SignalsBatch:
        layout = self.layout
        return SignalsBatch.empty(np.arange(rows), layout.row_tokens, layout.k, layout.sampling is not None)

    def _append_hidden(self, exact: TopK) -> None:
        try:
            if self._hidden is not None:
                self._hidden.append(exact)
        except OSError as error:
            raise self._disk_error(error) from error

    def _commit_hidden(self) -> dict[str, Any]:
        try:
            return {} if self._hidden is None else {"hidden": self._hidden.commit()}
        except OSError as error:
            raise self._disk_error(error) from error

    def refuse(self, found: Misaligned | None) -> None:
        """Raise StageError where the engine's log-probs do not belong to its tokens: before a byte is written."""
        if found is not None:
            raise StageError(
                f"the teacher engine's log-probs of row {self.job.first_row + self._rows + found.row} do not belong to "
                "its tokens",
                why=f"position {found.position}: the next token has log-prob {found.expected:.4f}, the entries say "
                f"{found.decoded:.4f}; {found.failures} of {found.checked} positions differ",
                fix="run the engine's tests: it shifts its output or computes the next token's log-prob otherwise",
            )

    def commit(self) -> ShardRecord:
        """Make the shard and then its record durable under their final names."""
        if self._file is None or self._rows != self.job.rows:
            raise StageError(f"shard {self.job.file} has {self._rows} rows, not {self.job.rows}")
        self._write(self._packer.finish())
        fields = {
            "file": self.job.file,
            "first_row": self.job.first_row,
            "rows": self._rows,
            "bytes": self._bytes,
            "sha256": self._sha.hexdigest(),
            "crc32": self._crcs,
            "source": self.source,
            "statistics": asdict(self.statistics),
            **self._packer.index(),
            **self._commit_hidden(),
        }
        record = canonical_json(fields).encode()
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self._part.replace(self.folder / self.job.file)
            write_text(self.folder / record_name(self.job.file), record.decode(), self._part.name)  # fsyncs the folder
        except OSError as error:
            raise self._disk_error(error) from error
        return ShardRecord(_entry(fields, record), self.statistics)

    def _write(self, blocks: list[bytes]) -> None:
        try:
            if self._file is None:
                self._file = self._part.open("wb")
            for data in blocks:
                self._write_block(self._file, data)
        except OSError as error:
            raise self._disk_error(error) from error

    def _write_block(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self._sha.update(data)
        self._crcs.append(zlib.crc32(data))
        self._bytes += len(data)

    @property
    def _part(self) -> Path:
        return self.folder / f".{self.job.file}{self._writer_id}.tmp"

    def _disk_error(self, error: OSError) -> StageError:
        """What to do about a failed write; gives the unfinished shard's space back, and no other writer's."""
        with contextlib.suppress(OSError):  # what is buffered cannot be written either
            if self._file is not None:
                self._file.close()
        if self._hidden is not None:
            self._hidden.drop()
        self._part.unlink(missing_ok=True)
        need = self.job.rows * self.layout.row_tokens * (self._variant.bytes_bound(self.layout) + self.layout.beside)
        return StageError(
            f"cannot write shard {self.job.file} in {self.folder}: {os.strerror(error.errno or 0)}",
            why=f"this shard takes {need / 1e6:.1f} MB; finished shards are kept",
            fix="free some space and run the same command again: it goes on with this shard",
        )


def check_engine_output(exact: TopK, layout: Layout) -> None:
    """Raise StageError where an engine gives what no teacher can: NaN, unsorted entries, ids outside the vocabulary."""
    ids, logp = exact.ids_BTK, exact.logp_BTK
    there = logp if layout.sampling is None else logp[~np.isneginf(logp)]  # fewer than K ids may have been drawn
    finite = np.isfinite(there).all() and np.isfinite(logp[..., 0]).all() and not np.isnan(exact.tail_BT).any()
    if not finite or not np.isfinite(exact.lp_next_BT[:, :-1]).all():
        raise StageError(
            "the teacher gave log-probs that are not finite",
            why="its weights or activations overflow in this precision",
            fix="set `precision: float32` in the teach stage, or check the teacher",
        )
    if ids.min() < 0 or ids.max() >= layout.vocab_size or (logp[..., 1:] > logp[..., :-1]).any():
        raise StageError("the teacher engine gave unsorted entries or ids outside the vocabulary")


def remove_parts(folder: Path) -> None:
    """Remove what an interrupted run left unfinished."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
