"""Scores shards on a Ray cluster: one engine an actor, shards taken from a queue as actors become free.

The driver sees records only: log-probs go from an engine to the run folder and nowhere else. A worker that is lost
gives its shard back; a shard that is whole on disk is taken as done, whoever wrote it, and never scored again.
"""

from __future__ import annotations

import re
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdistill.corpus.format import CorpusReader
from lmdistill.errors import StageError
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.jobs import error_from_json
from lmdistill.pipeline.process import OFFLINE
from lmdistill.pipeline.stage import Progress
from lmdistill.signals.ray_cluster import Crew, connected, size_crew
from lmdistill.signals.ray_worker import Answer, ShardWorker, expectations
from lmdistill.signals.shard_work import Meter, OnRecord, ShardWork
from lmdistill.signals.writer import ShardJob, ShardRecord, finished_shard

TICK_SECONDS = 0.5  # between two looks at the progress
ATTEMPTS = 3  # a shard, or the start of a worker, that fails so often stops the run
PATIENCE_SECONDS = 600.0  # without a word from any worker: some clusters grow only when they are asked

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class RayExecutor:
    """Runs a capture on the cluster at `address` (`auto`: the one of this machine, or one that is started)."""

    address: str
    workers: int | None = None  # None: as many as the cluster holds
    threads: int | None = None  # CPUs of a worker without a GPU; None: a machine's
    device: str = "auto"

    def run(self, work: ShardWork, jobs: Sequence[ShardJob], on_record: OnRecord, progress: Progress) -> None:
        """Score all jobs; raises a worker's LmdistillError, StageError where a shard fails again and again."""
        probe, token = work.folder / ".seen-by-workers.tmp", secrets.token_hex()
        write_text(probe, token)
        expected = expectations(work, probe, token)
        with connected(self.address, (self.workers or 1) * (self.threads or 1)) as ray:
            crew = size_crew(ray.nodes(), self.device, self.threads, self.workers)
            shift = Shift(ray, crew, work, jobs, on_record, progress, expected)
            try:
                shift.run()
            finally:
                shift.dismiss()
        probe.unlink()


class Worker:
    """The driver's side of one actor."""

    def __init__(self, actor: Any, number: int) -> None:
        self.actor, self.name = actor, f"worker {number}"
        self.job: ShardJob | None = None
        self.tokens = 0  # of its shard, when last heard of
        self.question: Any = None  # for its tokens, on the way


class Shift:
    """The jobs of one capture, shared out among workers until every shard is there."""

    def __init__(
        self,
        ray: Any,
        crew: Crew,
        work: ShardWork,
        jobs: Sequence[ShardJob],
        on_record: OnRecord,
        progress: Progress,
        expected: Answer,
    ) -> None:
        self._ray, self._crew, self._work, self._progress, self._expected = ray, crew, work, progress, expected
        self._on_record = on_record
        self._class = ray.remote(concurrency_groups={"progress": 1})(ShardWorker)
        self._corpus = CorpusReader(work.corpus)
        self._queue, self._left, self._tokens = deque(jobs), len(jobs), 0
        self._busy: dict[Any, Worker] = {}  # what is awaited, and of whom
        self._idle: list[Worker] = []
        self._failures: Counter[ShardJob | None] = Counter()  # None: of starts
        self._hired, self._heard = 0, time.monotonic()
        self._meter = Meter(sum(job.rows for job in jobs) * work.layout.row_tokens, progress)

    def run(self) -> None:
        """Until nothing is left."""
        self._share_out()
        while self._left:
            done, _ = self._ray.wait(list(self._busy), timeout=TICK_SECONDS)
            for awaited in done:
                self._settle(self._busy.pop(awaited), awaited)
            self._share_out()
            self._report()

    def dismiss(self) -> None:
        """Stop every worker."""
        for worker in [*self._busy.values(), *self._idle]:
            self._ray.kill(worker.actor, no_restart=True)
        self._busy, self._idle = {}, []

    def _share_out(self) -> None:
        """Give waiting shards to idle workers, and hire while shards wait and there is room."""
        while self._queue and self._idle:
            worker = self._idle.pop()
            worker.job, worker.tokens = self._queue.popleft(), 0
            source = self._work.source(self._corpus, worker.job)
            self._busy[worker.actor.score.remote(worker.job, source)] = worker
        starting = sum(worker.job is None for worker in self._busy.values())
        while starting < len(self._queue) and len(self._busy) < self._crew.workers:
            self._hired += 1
            starting += 1
            actor = self._class.options(**self._crew.options).remote(self._work, OFFLINE)
            self._busy[actor.open.remote(self._expected)] = Worker(actor, self._hired)

    def _settle(self, worker: Worker, awaited: Any) -> None:
        try:
            answer: Answer = self._ray.get(awaited)
        except self._ray.exceptions.RayError as error:  # the actor is gone, or was never there
            answer = {"crash": _reason(error)}
        if "error" in answer:
            self._idle.append(worker)  # to be dismissed with the others
            raise error_from_json(answer["error"])
        self._heard = time.monotonic()
        if "crash" in answer:
            self._lose(worker, answer)
            return
        if worker.job is None:
            worker.name += f" on {answer['host']}, process {answer['pid']}"
            self._progress.note(f"{worker.name}: its teacher is loaded")
            self._failures[None] = 0
        else:
            self._finish(worker.job, answer["record"])
        worker.job = None
        self._idle.append(worker)

    def _finish(self, job: ShardJob, record: ShardRecord) -> None:
        self._on_record(job, record)
        self._left -= 1
        self._tokens += job.rows * self._work.layout.row_tokens

    def _lose(self, worker: Worker, answer: Answer) -> None:
        """Note a worker's end; its shard goes to another, unless it was whole already, or has failed too often."""
        print(answer.get("traceback", ""), file=sys.stderr)
        self._ray.kill(worker.actor, no_restart=True)
        job, why = worker.job, answer["crash"]
        self._progress.note(f"{worker.name} is lost{f' with shard {job.file}' if job else ''}: {why}")
        if job is not None:
            source = self._work.source(self._corpus, job)
            record, _ = finished_shard(self._work.folder, job, self._work.layout, source)
            if record is not None:
                self._finish(job, record)
                return
            self._queue.appendleft(job)
        self._failures[job] += 1
        if self._failures[job] >= ATTEMPTS:
            raise StageError(
                f"shard {job.file} failed {ATTEMPTS} times" if job else f"{ATTEMPTS} workers could not start",
                why=why,
                fix="see the stage's log; finished shards are kept, and the same command goes on from there",
            )

    def _report(self) -> None:
        """Ask everyone for their tokens and tell the sum of what is known; never wait for an answer."""
        for worker in self._busy.values():
            if worker.question is None:
                worker.question = worker.actor.tokens.options(concurrency_group="progress").remote()
        asked = {worker.question: worker for worker in self._busy.values()}
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for question in answered:
            worker = asked[question]
            worker.question = None
            try:
                job, tokens = self._ray.get(question)
            except self._ray.exceptions.RayError:
                continue  # it is gone: what is awaited of it will say so
            self._heard = time.monotonic()
            worker.tokens = tokens if job == worker.job else 0  # the answer may be of the shard before
        working = [worker for worker in self._busy.values() if worker.job is not None]
        if working:
            self._meter.set(self._tokens + sum(worker.tokens for worker in working), workers=len(working))
        if time.monotonic() - self._heard > PATIENCE_SECONDS:
            self._give_up()

    def _give_up(self) -> None:
        free = {name: self._ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
        raise StageError(
            f"no worker has been heard of for {PATIENCE_SECONDS:.0f} s",
            why=f"each asks for {self._crew.cpus} CPUs and {self._crew.gpus} GPUs; the cluster has {free} free",
            fix="free the cluster, lower runtime.threads, or add machines; finished shards are kept",
        )


def _reason(error: Exception) -> str:
    """What Ray says of a lost actor, in one line: of one that failed to start the cause, else what happened."""
    lines = [line.strip() for line in ANSI.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "creation task" in lines[0] else lines[0]
