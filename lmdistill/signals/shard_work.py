"""How missing shards become files: what the work is, who may do it, and doing it in this process.

`Capture` plans the shards and hands the missing ones to an executor: `InProcess` here, or `RayExecutor`
(ray_capture.py). Both score a shard with the same lines, so that the bytes cannot depend on who did it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lmdistill.corpus.format import DOC_START, CorpusReader
from lmdistill.pipeline.stage import Progress
from lmdistill.signals.background import BackgroundWriter
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.signals.writer import ShardJob, ShardRecord, ShardWriter, source_digest
from lmdistill.teachers.draws import score
from lmdistill.teachers.engine import TeacherEngine

OnRecord = Callable[[ShardJob, ShardRecord], None]


@dataclass(frozen=True)
class ShardWork:
    """What every shard of one capture is made from; with a picklable `open_engine` it can be sent to other machines."""

    folder: Path
    corpus: Path
    layout: Layout
    teacher: TeacherInfo
    open_engine: Callable[[], TeacherEngine]
    batch_rows: int
    teacher_files: tuple[Path, ...] = ()  # what `open_engine` reads: must be the same on every machine

    def source(self, corpus: CorpusReader, job: ShardJob) -> str:
        """Identity of what a shard is made from: its tokens, the teacher, the layout."""
        split = corpus.split(job.split)
        return source_digest(self.layout, self.teacher, split.tokens_RT[job.span], split.flags_RT[job.span])

    def score(
        self,
        corpus: CorpusReader,
        job: ShardJob,
        engine: TeacherEngine,
        background: BackgroundWriter,
        on_tokens: Callable[[int], None],
        on_record: OnRecord,
        writer_id: str = "",
    ) -> None:
        """Score a shard's rows; they are written behind the next batch's forward, and `on_record` is called there.

        `writer_id` keeps apart the unfinished files of processes that may write the same shard at the same time.
        """
        split = corpus.split(job.split)
        writer = ShardWriter(self.folder, job, self.layout, self.source(corpus, job), writer_id)
        for start in range(job.span.start, job.span.stop, self.batch_rows):
            rows = slice(start, min(start + self.batch_rows, job.span.stop))
            tokens, flags = split.tokens_RT[rows].astype("int32"), split.flags_RT[rows]
            exact = score(engine, self.layout.sampling, (job.split, start), tokens, (flags & DOC_START) != 0)
            background.put(lambda t=tokens, f=flags, e=exact: writer.append(t, f, e))  # type: ignore[misc]
            on_tokens(tokens.size)
        background.put(lambda: on_record(job, writer.commit()))


class Executor(Protocol):
    """Who scores the missing shards of a capture."""

    def run(self, work: ShardWork, jobs: Sequence[ShardJob], on_record: OnRecord, progress: Progress) -> None:
        """Make every job's shard durable and report its record once; raises LmdistillError where that fails."""


class InProcess:
    """One engine in this process, shard after shard."""

    def run(self, work: ShardWork, jobs: Sequence[ShardJob], on_record: OnRecord, progress: Progress) -> None:
        """Score all jobs in order; the writer of one shard overlaps with the first forward of the next."""
        corpus, engine = CorpusReader(work.corpus), work.open_engine()
        meter = Meter(sum(job.rows for job in jobs) * work.layout.row_tokens, progress)
        with BackgroundWriter() as background:
            for job in jobs:
                work.score(corpus, job, engine, background, meter.add, on_record)


class Meter:
    """Counts tokens and tells the progress, with the mean speed since the first."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._done, self._started = 0, time.monotonic()

    def add(self, tokens: int) -> None:
        """So many more are scored."""
        self.set(self._done + tokens)

    def set(self, done: int, **figures: float | str) -> None:
        """So many are scored in all; `figures` are shown beside the speed."""
        self._done = done
        speed = round(done / max(time.monotonic() - self._started, 1e-9))
        self._progress.update(done, self._total, "tokens", tokens_per_second=speed, **figures)
