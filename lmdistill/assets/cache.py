"""The cache folder: where it is, locks between processes, digests remembered by size and time, atomic files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from lmdistill.errors import AssetError
from lmdistill.pipeline.stage import Progress

CHUNK = 1 << 20  # bytes
SETTLED_SECONDS = 2.0  # a file changed more recently may change again within one tick of its time stamp
IGNORED_PARTS = frozenset({".git", ".cache", "__pycache__", ".DS_Store"})


def cache_dir() -> Path:
    """The cache folder: $LMDISTILL_CACHE, else the user's cache folder of this platform."""
    if named := os.environ.get("LMDISTILL_CACHE"):
        return Path(named).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("lmdistill", appauthor=False)


def make_folder(folder: Path) -> Path:
    """Create `folder` in the cache; raises AssetError where the cache cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(
            f"cannot write the cache folder {folder}",
            why=str(error),
            fix="set LMDISTILL_CACHE to a folder you can write",
        ) from error
    return folder


@contextmanager
def locked(key: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of `key` between processes of this machine, saying so when another one has it."""
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    lock = FileLock(make_folder(cache_dir() / "locks") / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"waiting for another process that brings {key}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def copy_hashed(source: IO[bytes], target: Path, total: int, progress: Progress) -> str:
    """Stream `source` into `target` and force it to disk; returns the sha256 of what was copied."""
    sha, done = hashlib.sha256(), 0
    with target.open("wb") as sink:
        while chunk := source.read(CHUNK):
            sha.update(chunk)
            sink.write(chunk)
            done += len(chunk)
            progress.update(done, total, "bytes")
        sink.flush()
        os.fsync(sink.fileno())
    return sha.hexdigest()


def need_disk(folder: Path, needed: int, what: str) -> None:
    """Raise AssetError where the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AssetError(
            f"too little disk for {what}",
            why=f"it needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free",
            fix="free some space, or set LMDISTILL_CACHE to a folder on a larger disk",
        )


def write_text(path: Path, text: str) -> None:
    """Write a small file of the cache so that a reader sees all of it or nothing."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def sha256_of(path: Path) -> str:
    """sha256 of a file, remembered in the cache for as long as its size and time of change stay the same."""
    path = path.absolute()
    stat = path.stat()
    state = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    if (known := _read_note(note)) and {key: known.get(key) for key in state} == state:
        return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - stat.st_mtime_ns > SETTLED_SECONDS * 1e9:
        write_text(note, json.dumps({**state, "sha256": digest}))
    return digest


def _read_note(path: Path) -> dict[str, object] | None:
    try:
        note = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return note if isinstance(note, dict) else None


def content_digest(path: Path) -> str:
    """sha256 of a file; of a folder, sha256 over the sorted (relative name, sha256) of its files."""
    if path.is_file():
        return sha256_of(path)
    names = sorted(
        str(file.relative_to(path).as_posix())
        for file in path.rglob("*")
        if file.is_file() and not IGNORED_PARTS.intersection(file.relative_to(path).parts)
    )
    listing = [[name, sha256_of(path / name)] for name in names]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
