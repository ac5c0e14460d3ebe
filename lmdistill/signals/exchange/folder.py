"""A cache on its way: it lies beside its name, bound to what it is made from, until it is whole and proven.

A folder's name is taken by a rename at the very end, so that no reader ever meets half a cache. After a kill the same
command goes on in what lies there; another command is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError, LockedError, PreflightError
from lmdistill.pipeline.files import fsync, fsync_tree, write_json
from lmdistill.signals.inspect import verify
from lmdistill.signals.writer import remove_parts

JOB_FILE = "job.json"


@contextlib.contextmanager
def made_whole(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """A folder to write a cache into; it becomes `out` where the block ends well and every shard proves itself.

    `job` says what is made from what. Raises PreflightError where `out` is taken, or an unfinished cache of another
    job lies in its place.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    if out.exists():
        raise PreflightError(f"{out} is there already", fix="give another folder, or delete it")
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial, out):
        _bind(partial, out, job)
        folder = partial / "cache"
        folder.mkdir(exist_ok=True)
        remove_parts(folder)
        try:
            yield folder
        except PreflightError:  # what it is made from is unfit: nothing here can be gone on with
            shutil.rmtree(partial)
            raise
        _prove(folder)
        fsync_tree(folder)
        folder.rename(out)
        fsync(out.parent)
    shutil.rmtree(partial)


@contextlib.contextmanager
def _lock(partial: Path, out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(partial / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LockedError(f"another process makes {out}", fix="wait for it, or stop it") from error
    try:
        yield
    finally:
        lock.release()


def _bind(partial: Path, out: Path, job: dict[str, Any]) -> None:
    path = partial / JOB_FILE
    begun = json.loads(path.read_text()) if path.exists() else job
    if begun != job:
        differing = sorted(key for key in {*begun, *job} if begun.get(key) != job.get(key))
        raise PreflightError(
            f"an unfinished cache of another command lies in {partial}",
            why=f"it differs in {', '.join(differing)}",
            fix=f"finish it with the command that began it, delete that folder, or name another than {out}",
        )
    write_json(path, job)


def _prove(folder: Path) -> None:
    problems = verify(folder)
    if problems:
        raise IntegrityError(
            f"the new cache is not what was written: {len(problems)} problems",
            why="\n       ".join(problems[:4]),
            fix=f"check the disk, delete {folder.parent} and run the command again",
        )


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer that lies in an imported cache."""
    from lmdistill.checkpoints import copy_tokenizer
    from lmdistill.corpus.format import TOKENIZER_FOLDER

    if (source / TOKENIZER_FOLDER).is_dir():
        copy_tokenizer(source / TOKENIZER_FOLDER, target / TOKENIZER_FOLDER)


def take(source: Path, target: Path) -> None:
    """Put a finished file in another place: a second name of the same bytes where the file system can, else a copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    partial = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, partial)
    fsync(partial)
    partial.replace(target)
