"""Files that survive a kill: hashing, fsync, and writing a file under another name before it takes its own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """The file's sha256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and `folder` itself, durable."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync(Path(parent) / name)
        fsync(Path(parent))


def write_text(path: Path, text: str, partial_name: str = "") -> None:
    """Write a file that is there in full or not at all, even after a power cut.

    Processes that may write it at the same time each give the name it has before it is whole.
    """
    partial = path.with_name(partial_name or f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON with sorted keys, for people to read."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
