"""Captures a teacher cache: plans the shards, keeps the finished ones, scores the rest, writes the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmdistill.corpus.format import CorpusReader, CorpusSplit
from lmdistill.errors import IntegrityError, StageError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import Progress
from lmdistill.signals.format import MANIFEST_FILE, Layout, Manifest, SplitEntry, TeacherInfo, bytes_per_token
from lmdistill.signals.shard_work import Executor, InProcess, ShardWork
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.writer import ShardJob, ShardRecord, finished_shard, plan_shards, remove_parts
from lmdistill.teachers.engine import TeacherEngine


@dataclass
class Capture:
    """One capture of `splits` of a corpus into `folder`; run again after a kill it goes on with the next shard."""

    folder: Path
    corpus: CorpusReader
    splits: Sequence[str]
    layout: Layout
    teacher: TeacherInfo
    open_engine: Callable[[], TeacherEngine]  # called once by every worker, and only if a shard is missing
    shard_rows: int
    batch_rows: int
    progress: Progress
    executor: Executor = field(default_factory=InProcess)
    teacher_files: tuple[Path, ...] = ()  # what `open_engine` reads

    def run(self) -> Manifest:
        """Write what is missing and signals.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_parts(self.folder)
        jobs = self.jobs()
        records = {job: self._finished(job) for job in jobs}
        missing = [job for job, record in records.items() if record is None]
        kept = len(jobs) - len(missing)
        if kept:
            self.progress.note(f"{kept} of {len(jobs)} shards were finished before and are kept")
        if missing:
            self.executor.run(self.work, missing, records.__setitem__, self.progress)
            remove_parts(self.folder)  # of workers that were lost
        manifest = self._manifest({job: record for job, record in records.items() if record is not None})
        self._write(manifest)
        return manifest

    def jobs(self) -> list[ShardJob]:
        """Every shard of the cache, in order."""
        return [job for name in self.splits for job in plan_shards(name, len(self._split(name)), self.shard_rows)]

    @property
    def work(self) -> ShardWork:
        """What the shards are made from."""
        return ShardWork(
            self.folder,
            self.corpus.folder,
            self.layout,
            self.teacher,
            self.open_engine,
            self.batch_rows,
            self.teacher_files,
        )

    def _split(self, name: str) -> CorpusSplit:
        split = self.corpus.split(name)
        if not len(split):
            raise IntegrityError(f"split '{name}' of the corpus is empty", fix=f"drop '{name}' from `splits`")
        return split

    def _finished(self, job: ShardJob) -> ShardRecord | None:
        record, problems = finished_shard(self.folder, job, self.layout, self.work.source(self.corpus, job))
        for problem in problems:
            self.progress.note(f"recomputing shard {job.file}: {problem}")
        return record

    def _write(self, manifest: Manifest) -> None:
        try:
            write_text(self.folder / MANIFEST_FILE, manifest.to_json())
        except OSError as error:
            raise StageError(
                f"cannot write {MANIFEST_FILE} in {self.folder}: {os.strerror(error.errno or 0)}",
                why="all shards are finished and kept",
                fix="free some space and run the same command again",
            ) from error

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
