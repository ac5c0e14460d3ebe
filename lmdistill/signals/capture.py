"""Captures a teacher cache: plans the shards, keeps the finished ones, scores the rest, writes the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmdistill.corpus.format import DOC_START, CorpusReader, CorpusSplit
from lmdistill.errors import IntegrityError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import Progress
from lmdistill.signals.background import BackgroundWriter
from lmdistill.signals.format import MANIFEST_FILE, Layout, Manifest, SplitEntry, TeacherInfo, bytes_per_token
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.writer import (
    ShardJob,
    ShardRecord,
    ShardWriter,
    finished_shard,
    plan_shards,
    remove_parts,
    source_digest,
)
from lmdistill.teachers.engine import TeacherEngine


@dataclass
class Capture:
    """One capture of `splits` of a corpus into `folder`; run again after a kill it goes on with the next shard."""

    folder: Path
    corpus: CorpusReader
    splits: Sequence[str]
    layout: Layout
    teacher: TeacherInfo
    open_engine: Callable[[], TeacherEngine]  # called once, and only if a shard is missing
    shard_rows: int
    batch_rows: int
    progress: Progress

    def run(self) -> Manifest:
        """Write what is missing and signals.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_parts(self.folder)
        jobs = [job for name in self.splits for job in plan_shards(name, len(self._split(name)), self.shard_rows)]
        records = {job: self._finished(job) for job in jobs}
        missing = [job for job, record in records.items() if record is None]
        kept = len(jobs) - len(missing)
        if kept:
            self.progress.note(f"{kept} of {len(jobs)} shards were finished before and are kept")
        if missing:
            self._write(missing, records)
        manifest = self._manifest({job: record for job, record in records.items() if record is not None})
        write_text(self.folder / MANIFEST_FILE, manifest.to_json())
        return manifest

    def _split(self, name: str) -> CorpusSplit:
        split = self.corpus.split(name)
        if not len(split):
            raise IntegrityError(f"split '{name}' of the corpus is empty", fix=f"drop '{name}' from `splits`")
        return split

    def _source(self, job: ShardJob) -> str:
        split = self.corpus.split(job.split)
        return source_digest(self.layout, self.teacher, split.tokens_RT[job.span], split.flags_RT[job.span])

    def _finished(self, job: ShardJob) -> ShardRecord | None:
        record, problems = finished_shard(self.folder, job, self.layout, self._source(job))
        for problem in problems:
            self.progress.note(f"recomputing shard {job.file}: {problem}")
        return record

    def _write(self, missing: list[ShardJob], records: dict[ShardJob, ShardRecord | None]) -> None:
        engine = self.open_engine()
        total = sum(job.rows for job in missing) * self.layout.row_tokens
        done, started = 0, time.monotonic()
        with BackgroundWriter() as background:
            for job in missing:
                split = self.corpus.split(job.split)
                writer = ShardWriter(self.folder, job, self.layout, self._source(job))
                for start in range(job.span.start, job.span.stop, self.batch_rows):
                    rows = slice(start, min(start + self.batch_rows, job.span.stop))
                    tokens, flags = split.tokens_RT[rows].astype("int32"), split.flags_RT[rows]
                    exact = engine.score(tokens, (flags & DOC_START) != 0)
                    background.put(lambda w=writer, t=tokens, f=flags, e=exact: w.append(t, f, e))  # type: ignore[misc]
                    done += tokens.size
                    speed = done / (time.monotonic() - started)
                    self.progress.update(done, total, "tokens", tokens_per_second=round(speed))
                background.put(lambda w=writer, j=job: records.update({j: w.commit()}))  # type: ignore[misc]

    def _manifest(self, records: dict[ShardJob, ShardRecord]) -> Manifest:
        splits = {}
        for name in self.splits:
            shards = [record for job, record in records.items() if job.split == name]
            entries = tuple(record.entry for record in shards)
            statistics = Statistics()
            for record in shards:
                statistics.merge(record.statistics)
            splits[name] = SplitEntry(
                rows=sum(entry.rows for entry in entries),
                corpus_digest=self.corpus.digest(name),
                shards=entries,
                statistics=statistics.summary(bytes_per_token(self.layout, entries)),
            )
        meta = self.corpus.meta
        return Manifest(
            layout=self.layout,
            shard_rows=self.shard_rows,
            packing=meta.packing,
            tokenizer_digest=meta.tokenizer_digest,
            chat_template_digest=meta.chat_template_digest,
            teacher=self.teacher,
            splits=splits,
        )
