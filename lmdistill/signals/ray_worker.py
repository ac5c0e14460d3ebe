"""What runs in a Ray actor: one teacher engine that scores the shards it is given, on any machine of the cluster.

Nothing of Ray is imported here. Failures go back as plain data (an answer's `error` or `crash`), so that the driver
shows the very message and never an exception that only the worker could unpickle.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lmdistill
from lmdistill.corpus.format import CorpusReader
from lmdistill.errors import LmdistillError, StageError
from lmdistill.signals.background import BackgroundWriter
from lmdistill.signals.shard_work import ShardWork
from lmdistill.signals.writer import ShardJob, ShardRecord
from lmdistill.teachers.engine import TeacherEngine

Answer = dict[str, Any]
CODING = ("numpy", "pcodec", "zstandard")  # distributions that turn predictions into bytes, whatever the engine


class ShardWorker:
    """One engine, opened by `open`; `score` makes shards durable; `tokens` may be asked meanwhile."""

    def __init__(self, work: ShardWork, environment: Mapping[str, str]) -> None:
        """Take the environment of the driver's own stage process."""
        os.environ.update(environment)
        self.work, self._tokens = work, 0
        self._job: ShardJob | None = None
        self._engine: TeacherEngine | None = None
        self._corpus: CorpusReader | None = None

    def open(self, expected: Answer) -> Answer:
        """Compare this machine with the driver's (`expected`), then open corpus and engine; says who this is."""
        return _answer(lambda: self._open(expected))

    def score(self, job: ShardJob, source: str) -> Answer:
        """Write one shard; answers with its record. `source` is what the driver holds it to be made from."""
        return _answer(lambda: {"record": self._score(job, source)})

    def tokens(self) -> tuple[ShardJob | None, int]:
        """The current shard, and how many of its tokens are scored."""
        return self._job, self._tokens

    def _open(self, expected: Answer) -> Answer:
        same_files(self.work, expected)
        same_software(expected["software"])
        self._corpus = CorpusReader(self.work.corpus)
        self._engine = self.work.open_engine()
        same_engine(self._engine.version(), self.work.teacher.engine_version)
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def _score(self, job: ShardJob, source: str) -> ShardRecord:
        assert self._corpus is not None and self._engine is not None  # the driver gives work to open workers only
        if self.work.source(self._corpus, job) != source:
            raise _differs("the corpus", f"rows {job.first_row}–{job.first_row + job.rows - 1} of '{job.split}'")
        self._job, self._tokens = job, 0
        records: list[ShardRecord] = []
        writer_id = f"-{socket.gethostname()}-{os.getpid()}"
        with BackgroundWriter() as background:
            self.work.score(
                self._corpus,
                job,
                self._engine,
                background,
                self._count,
                lambda _, record: records.append(record),
                writer_id,
            )
        return records[0]

    def _count(self, tokens: int) -> None:
        self._tokens += tokens


def _answer(call: Callable[[], Answer]) -> Answer:
    from lmdistill.pipeline.jobs import error_to_json

    try:
        return call()
    except LmdistillError as error:
        return {"error": error_to_json(error)}
    except Exception as error:  # an engine may raise anything: the driver counts it and tries again
        traceback.print_exc()  # into the worker's log
        return {"crash": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def expectations(work: ShardWork, probe: Path, token: str) -> Answer:
    """What the driver's machine has and every worker's must have; `probe` is a file of the run folder with `token`."""
    return {
        "probe": str(probe),
        "token": token,
        "files": {str(path): _digest(path) for path in work.teacher_files},
        "software": software(),
    }


def same_files(work: ShardWork, expected: Answer) -> None:
    """Raise StageError where the run folder is not the driver's, or the teacher is missing or another one."""
    probe = Path(expected["probe"])
    try:
        seen = probe.read_text()
    except OSError:
        seen = ""
    if seen != expected["token"] or not work.corpus.is_dir():
        raise StageError(
            f"worker on {socket.gethostname()} does not see the run folder",
            why=f"{work.folder} or {work.corpus} is not there, or is a folder of its own",
            fix="put the run folder on storage that every machine of the cluster mounts at the same path",
        )
    for name, digest in expected["files"].items():
        path = Path(name)
        if not path.exists():
            raise StageError(
                f"worker on {socket.gethostname()} has no teacher at {path}",
                fix="put LMDISTILL_CACHE (or the teacher's folder) on storage that every machine mounts at this path",
            )
        if _digest(path) != digest:
            raise _differs("the teacher", f"{path} has other contents")


def software() -> dict[str, str]:
    """What turns tokens into bytes besides the engine: lmdistill's own code, Python, numpy, the coders."""
    from lmdistill.pipeline.keys import tool_versions

    code = hashlib.sha256()
    root = Path(lmdistill.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "lmdistill": f"{lmdistill.__version__} ({code.hexdigest()[:12]})",
        "python": platform.python_version(),
        "byte order": sys.byteorder,
        **tool_versions(CODING),
    }


def same_software(expected: Mapping[str, str]) -> None:
    """Raise StageError where packages have other versions here than where the driver runs."""
    here = software()
    other = [f"{name} {here[name]} there, {wanted} here" for name, wanted in expected.items() if here[name] != wanted]
    if other:
        raise _differs("the software", "; ".join(other))


def same_engine(found: str, wanted: str) -> None:
    """Raise StageError where the engine's packages have other versions than the driver's."""
    if found != wanted:
        raise _differs("the teacher engine", f"{found} there, {wanted} here")


def _digest(path: Path) -> str:
    from lmdistill.assets.cache import content_digest

    return content_digest(path)


def _differs(what: str, how: str) -> StageError:
    return StageError(
        f"{what} of the worker on {socket.gethostname()} is not that of the machine where the run was started",
        why=f"{how}: the cache's bytes would depend on who wrote a shard",
        fix="give every machine of the cluster the same environment and files",
    )
