"""Several caches of one teacher as one: all rows, split by split, in the order the caches are given.

Shards are taken as they are, under new names, so that nothing is decoded and nothing is lost; they may differ in
length. A row is its tokens and flags. With `deduplicate` a row that comes again is left out, and one that is held out
in `valid` is nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import LOSS, PAD, VALID
from lmdistill.errors import PreflightError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import Progress, SilentProgress
from lmdistill.signals.exchange.folder import carry_tokenizer, made_whole, take
from lmdistill.signals.exchange.rows import Cache, rows_digest, split_entry, tokens_of
from lmdistill.signals.format import (
    MANIFEST_FILE,
    Manifest,
    ShardEntry,
    SplitEntry,
    canonical_json,
    record_name,
    sha256_of,
)
from lmdistill.signals.hidden_files import hidden_name
from lmdistill.signals.integrity import shard_problems
from lmdistill.signals.shard_work import Meter
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.writer import ShardJob, ShardRecord, ShardWriter, source_digest

KEY_BYTES = 16  # of a row's digest


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    manifest: Manifest
    duplicates: int  # rows that came again in their split
    leaked: int  # rows of other splits that are held out in `valid`
    dropped: int


@dataclass(frozen=True)
class _Piece:
    """A shard of one cache, and which of its rows go on; None: all."""

    cache: Cache
    shard: ShardEntry
    keep_R: NDArray[np.bool_] | None


def merge(out: Path, folders: Sequence[Path], deduplicate: bool = False, progress: Progress | None = None) -> Merged:
    """Write the rows of the caches in `folders` to `out`; goes on where a killed run stopped.

    Raises PreflightError naming the first field in which the caches differ, IntegrityError for a damaged one.
    """
    caches = [Cache(folder) for folder in folders]
    if len(caches) < 2:
        raise PreflightError("merge needs two caches or more", fix="name them after OUT")
    for cache in caches[1:]:
        _check_like(caches[0], cache)
    sources = [cache.manifest.digest for cache in caches]
    job = {"command": "merge", "sources": sources, "deduplicate": deduplicate}
    with made_whole(out, job) as target:
        return _Merge(caches, target, progress or SilentProgress()).run(deduplicate)


def _check_like(first: Cache, other: Cache) -> None:
    ours, theirs = _identity(first.manifest), _identity(other.manifest)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise PreflightError(
                f"{first.folder} and {other.folder} differ in {name}",
                why=f"{ours.get(name)} and {theirs.get(name)}",
                fix="`lmdistill cache convert` brings caches to one variant and K; anything else is another cache",
            )


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What caches must have in common to be one, by the name a message gives it."""
    teacher = {f"the teacher's {name}": value for name, value in manifest.teacher.fields.items() if name != "source"}
    imports = {_kind(asdict(source)) for source in manifest.imported}
    return {
        **teacher,
        **{f"layout.{name}": value for name, value in manifest.layout.fields.items()},
        "the tokenizer's digest": manifest.tokenizer_digest,
        "the chat template's digest": manifest.chat_template_digest,
        "packing": manifest.packing,
        "how they were imported": sorted(imports),
    }


def _kind(source: dict[str, Any]) -> str:
    return canonical_json({name: source[name] for name in ("format", "tail_floor", "temperature", "renormalised")})


def _seen_before(keys: Sequence[bytes], seen: set[bytes]) -> NDArray[np.bool_]:
    """Which keys are in `seen` when it is their turn; all are put there."""
    marks = np.zeros(len(keys), bool)
    for place, key in enumerate(keys):
        marks[place] = key in seen
        seen.add(key)
    return marks


class _Merge:
    """The work: which rows go on, then shard after shard."""

    def __init__(self, caches: Sequence[Cache], target: Path, progress: Progress) -> None:
        self.caches, self.target, self.first = caches, target, caches[0].manifest
        self.names = list(dict.fromkeys(name for cache in caches for name in cache.manifest.splits))
        rows = sum(split.rows for cache in caches for split in cache.manifest.splits.values())
        self.meter = Meter(2 * rows * self.first.layout.row_tokens, progress)

    def run(self, deduplicate: bool) -> Merged:
        """Look at every row, write what stays, then the manifest."""
        again, leaked = self._repeated()
        counts = [sum(int(marks.sum()) for marks in found.values()) for found in (again, leaked)]
        drop = {key: again[key] | leaked[key] for key in again} if deduplicate else {}
        dropped = sum(int(marks.sum()) for marks in drop.values())
        splits = {name: self._split(name, drop) for name in self.names}
        splits = {name: entry for name, entry in splits.items() if entry.rows}
        imported = tuple(dict.fromkeys(source for cache in self.caches for source in cache.manifest.imported))
        manifest = replace(self.first, shard_rows=0, splits=splits, imported=imported)
        carry_tokenizer(self.caches[0].folder, self.target)
        write_text(self.target / MANIFEST_FILE, manifest.to_json())
        return Merged(manifest, counts[0], counts[1], dropped)

    def _repeated(self) -> tuple[dict[tuple[int, str], NDArray[np.bool_]], dict[tuple[int, str], NDArray[np.bool_]]]:
        """Rows of each (cache, split) that came before in their split, and those that are held out in `valid`."""
        again, leaked, held_out = {}, {}, set[bytes]()
        for name in sorted(self.names, key=lambda name: name != VALID):
            seen = set[bytes]()
            for index, cache in enumerate(self.caches):
                keys = list(self._keys(cache, name))
                leaked[index, name] = np.array([key in held_out for key in keys], bool)
                again[index, name] = _seen_before(keys, seen)
            if name == VALID:
                held_out = seen
        return again, leaked

    def _keys(self, cache: Cache, name: str) -> Iterator[bytes]:
        split = cache.manifest.splits.get(name)
        for shard in split.shards if split else ():
            cache.record(shard)  # its bytes are what was written
            for tokens_RT, flags_RT in cache.tokens([shard]):
                for tokens_T, flags_T in zip(tokens_RT, flags_RT, strict=True):
                    yield hashlib.sha256(tokens_T.tobytes() + flags_T.tobytes()).digest()[:KEY_BYTES]
            self.meter.add(shard.rows * cache.layout.row_tokens)

    def _split(self, name: str, drop: dict[tuple[int, str], NDArray[np.bool_]]) -> SplitEntry:
        pieces, records = list(self._pieces(name, drop)), []
        rows = [piece.shard.rows if piece.keep_R is None else int(piece.keep_R.sum()) for piece in pieces]
        starts = np.cumsum([0, *rows]).tolist()
        for index, (piece, (start, stop)) in enumerate(zip(pieces, pairwise(starts), strict=True)):
            job = ShardJob(name, index, start, stop - start)
            records.append(self._taken(job, piece) if piece.keep_R is None else self._rewritten(job, piece))
            self.meter.add(piece.shard.rows * self.first.layout.row_tokens)
        digest = rows_digest(starts[-1], self.first.layout.row_tokens, self._tokens(pieces))
        entry = split_entry(self.first.layout, digest, records)
        return replace(entry, statistics={**entry.statistics, **self._counts(pieces)})

    def _pieces(self, name: str, drop: dict[tuple[int, str], NDArray[np.bool_]]) -> Iterator[_Piece]:
        """The shards that hold a split's rows, in order; those of which nothing stays are left out."""
        for index, cache in enumerate(self.caches):
            split = cache.manifest.splits.get(name)
            marks = drop.get((index, name))
            for shard in split.shards if split else ():
                span = slice(shard.first_row, shard.first_row + shard.rows)
                keep_R = None if marks is None or not marks[span].any() else ~marks[span]
                if keep_R is None or keep_R.any():
                    yield _Piece(cache, shard, keep_R)

    def _taken(self, job: ShardJob, piece: _Piece) -> ShardRecord:
        """A whole shard under its new name; its record says the name and the place."""
        cache, shard = piece.cache, piece.shard
        fields = {**cache.record(shard), "file": job.file, "first_row": job.first_row}
        record = canonical_json(fields).encode()
        entry = replace(shard, file=job.file, first_row=job.first_row, record_sha256=sha256_of(record))
        if shard_problems(self.target, entry, cache.layout):
            take(cache.folder / shard.file, self.target / job.file)
            if cache.layout.hidden is not None:
                take(cache.folder / hidden_name(shard.file), self.target / hidden_name(job.file))
            write_text(self.target / record_name(job.file), record.decode())
        return ShardRecord(entry, Statistics(**fields["statistics"]))

    def _rewritten(self, job: ShardJob, piece: _Piece) -> ShardRecord:
        """The rows of a shard that stay; its statistics are those of all its rows, as they were measured."""
        cache, record, first, seen = piece.cache, piece.cache.record(piece.shard), 0, []
        writer = ShardWriter(self.target, job, cache.layout, "")
        assert piece.keep_R is not None
        for chunk in cache.chunks(piece.shard):
            kept = chunk.kept(piece.keep_R[first : first + len(chunk.raw_R)])
            first += len(chunk.raw_R)
            writer.append_coded(kept.raw_R, kept.hidden_R)
            seen.append(tokens_of(cache.layout, kept.raw_R))
        tokens_RT, flags_RT = (np.concatenate(columns) for columns in zip(*seen, strict=True))
        writer.source = source_digest(cache.layout, cache.manifest.teacher, tokens_RT, flags_RT)
        writer.statistics = Statistics(**record["statistics"])
        return writer.commit()

    def _tokens(self, pieces: Sequence[_Piece]) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
        for piece in pieces:
            first = 0
            for tokens_RT, flags_RT in piece.cache.tokens([piece.shard]):
                keep_R = slice(None) if piece.keep_R is None else piece.keep_R[first : first + len(tokens_RT)]
                first += len(tokens_RT)
                yield tokens_RT[keep_R], flags_RT[keep_R]

    def _counts(self, pieces: Sequence[_Piece]) -> dict[str, int]:
        """Tokens and targets of the rows that stay."""
        tokens, targets = 0, 0
        for _, flags_RT in self._tokens(pieces):
            tokens += int(((flags_RT & PAD) == 0).sum())
            targets += int(((flags_RT[:, :-1] & LOSS) != 0).sum())
        return {"tokens": tokens, "targets": targets}
