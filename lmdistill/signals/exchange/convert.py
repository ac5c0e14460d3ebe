"""A cache in another variant, or with fewer entries of a token, without the teacher.

Axes: R rows, T tokens in a row, K entries of a token.
Variants that share a coding hold the same coded rows, so that converting loses nothing and there and back gives the
same bytes. Fewer entries: the codes of those that stay are untouched and the rest of 1 is the tail's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import Progress, SilentProgress
from lmdistill.signals import variant as variants
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.codec import logsumexp
from lmdistill.signals.exchange.folder import carry_tokenizer, made_whole
from lmdistill.signals.exchange.rows import Cache, Chunk, keeps_top_k, split_entry, tokens_of
from lmdistill.signals.format import MANIFEST_FILE, Layout, Manifest, ShardEntry, record_name
from lmdistill.signals.shard_work import Meter
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.writer import ShardJob, ShardRecord, ShardWriter, finished_shard, source_digest
from lmdistill.teachers.engine import TopK


def convert(
    folder: Path, out: Path, variant: str | None = None, k: int | None = None, progress: Progress | None = None
) -> Manifest:
    """Write the cache in `folder` to `out`, in `variant` and with the `k` most likely entries; None: as it is.

    Goes on where a killed run stopped. Raises PreflightError where that cannot be, IntegrityError for a damaged source.
    """
    source = Cache(folder)
    layout = _target(source.layout, variant or source.layout.variant, source.layout.k if k is None else k)
    job = {"command": "convert", "source": source.manifest.digest, "variant": layout.variant, "k": layout.k}
    with made_whole(out, job) as target:
        work = _Conversion(source, target, layout)
        shards = [(name, shard) for name, split in source.manifest.splits.items() for shard in split.shards]
        meter = Meter(2 * sum(shard.rows for _, shard in shards) * layout.row_tokens, progress or SilentProgress())
        records: dict[str, list[ShardRecord]] = {name: [] for name in source.manifest.splits}
        for name, shard in shards:
            records[name].append(work.shard(name, len(records[name]), shard))
            meter.add(shard.rows * layout.row_tokens)
        splits = {
            name: split_entry(layout, split.corpus_digest, records[name])
            for name, split in source.manifest.splits.items()
        }
        manifest = replace(source.manifest, layout=layout, splits=splits)
        carry_tokenizer(source.folder, target)
        write_text(target / MANIFEST_FILE, manifest.to_json())
        for name, shard in shards:
            work.compare(Cache(target), name, shard)
            meter.add(shard.rows * layout.row_tokens)
    return manifest


def _target(layout: Layout, variant: str, k: int) -> Layout:
    """The layout to write; raises PreflightError where rows of `layout` cannot be had in it."""
    theirs, ours = type(variants.get(layout.variant)), type(variants.get(variant))
    if (theirs.code, theirs.dtype) != (ours.code, ours.dtype):
        raise PreflightError(
            f"a cache of variant '{layout.variant}' cannot become '{variant}'",
            why="they keep different things of the teacher's predictions",
            fix="run the teach stage with the variant that is wanted",
        )
    if not 1 <= k <= layout.k:
        raise PreflightError(
            f"--k {k}: the cache has {layout.k} entries of a token",
            fix=f"give 1 to {layout.k}; the teacher alone has more",
        )
    if k == layout.k:
        return replace(layout, variant=variant)
    if not keeps_top_k(variant):
        raise PreflightError(
            f"a cache of variant '{variant}' cannot lose entries",
            why="it keeps draws, each of which counts",
            fix="leave out --k; fewer draws are another capture",
        )
    fewest = None if layout.k_min is None else min(layout.k_min, k)
    return replace(layout, variant=variant, k=k, k_min=fewest, cut_from=layout.cut_from or layout.k)


class _Conversion:
    """From the shards of one cache to those of another, row by row."""

    def __init__(self, source: Cache, target: Path, layout: Layout) -> None:
        self.source, self.target, self.layout = source, target, layout

    def shard(self, split: str, index: int, shard: ShardEntry) -> ShardRecord:
        """Write one shard, or keep it where a killed run had finished it."""
        job = ShardJob(split, index, shard.first_row, shard.rows)
        record = self.source.record(shard)
        if (self.target / record_name(job.file)).exists():
            kept, _ = finished_shard(self.target, job, self.layout, self._identity(self.source.tokens([shard])))
            if kept is not None:
                return kept
        writer = ShardWriter(self.target, job, self.layout, "")
        recount, seen = Statistics(), []
        for chunk in self._rows(shard, recount):
            writer.append_coded(chunk.raw_R, chunk.hidden_R)
            seen.append(tokens_of(self.layout, chunk.raw_R))
        writer.source = self._identity(iter(seen))
        writer.statistics = self._statistics(Statistics(**record["statistics"]), recount)
        return writer.commit()

    def compare(self, written: Cache, split: str, shard: ShardEntry) -> None:
        """Raise IntegrityError where the new shard does not hold the rows that it was given."""
        [twin] = [entry for entry in written.manifest.splits[split].shards if entry.first_row == shard.first_row]
        wanted, found = self._rows(shard, Statistics()), written.chunks(twin)
        if _bytes_of(wanted) != _bytes_of(found):
            raise IntegrityError(
                f"shard {twin.file} does not read as it was written",
                fix=f"report this with the cache {self.source.folder}: its variants disagree",
            )

    def _identity(self, tokens: Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]) -> str:
        pairs = list(tokens)
        tokens_RT, flags_RT = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
        return source_digest(self.layout, self.source.manifest.teacher, tokens_RT, flags_RT)

    def _rows(self, shard: ShardEntry, recount: Statistics) -> Iterator[Chunk]:
        for chunk in self.source.chunks(shard):
            if self.layout.k < self.source.layout.k:
                yield Chunk(cut(self.source.layout, self.layout, chunk.raw_R, recount), chunk.hidden_R)
            else:
                yield chunk

    def _statistics(self, measured: Statistics, recount: Statistics) -> Statistics:
        """Those of the shard's record; after a cut, what K changes is counted anew.

        The code's KL stays: over fewer entries and a larger rest it is no greater.
        """
        if self.layout.k == self.source.layout.k:
            return measured
        renewed = {name: asdict(recount)[name] for name in ("head_mass", "entropy", "observed", "sum_error_max")}
        return replace(measured, **renewed)


def cut(layout: Layout, fewer: Layout, raw_R: NDArray[Any], count: Statistics) -> NDArray[Any]:
    """Coded rows with the first `fewer.k` entries; what is dropped goes to the tail. Adds them to `count`."""
    variant, k = variants.get(layout.variant), fewer.k
    whole = SignalsBatch.empty(np.arange(len(raw_R)), layout.row_tokens, layout.k)
    variant.decode(layout, raw_R, whole)
    tail_RT = np.logaddexp(whole.tail_RT, logsumexp(whole.logp_RTK[..., k:])).astype(np.float32)
    logp_RTK = np.ascontiguousarray(whole.logp_RTK[..., :k])
    exact = TopK(whole.ids_RTK[..., :k], logp_RTK, tail_RT, whole.lp_next_RT)
    cut_R = variant.code(fewer, whole.tokens_RT, whole.flags_RT, exact)
    for name in ("top1", "lp_next"):  # as they were, to the last bit
        cut_R[name] = raw_R[name]
    cut_R["gaps"] = raw_R["gaps"][..., : k - 1]
    decoded = SignalsBatch.empty(whole.rows, fewer.row_tokens, k)
    variant.decode(fewer, cut_R, decoded)
    count.add(whole.tokens_RT, whole.flags_RT, exact, decoded.logp_RTK, decoded.tail_RT)
    return cut_R


def _bytes_of(chunks: Iterator[Chunk]) -> str:
    """sha256 over coded rows and hidden states."""
    rows, hidden = hashlib.sha256(), hashlib.sha256()
    for chunk in chunks:
        rows.update(chunk.raw_R.tobytes())
        if chunk.hidden_R is not None:
            hidden.update(chunk.hidden_R.tobytes())
    return rows.hexdigest() + hidden.hexdigest()
