"""Single-byte flips at random places of a cache: is every one detected, and does a problem name where it is?"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.signals.format import MANIFEST_FILE, load_manifest
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader

RANGE = re.compile(r"bytes (\d+)–(\d+)")


def flip_many(cache: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Flip one byte after another (each is put back); every file is as likely as any other, and every byte of it.

    `missed`, `unlocated` and `read_anyway` name the flips (file, offset, mask) that `lmdistill cache verify` did not
    see, saw elsewhere, or that a reader gave rows of the damaged file for; all must be empty.
    """
    chance = random.Random(seed)
    files = sorted(path for path in cache.iterdir() if path.is_file())
    splits = load_manifest(cache).splits
    hits = {"manifest": 0, "records": 0, "shards": 0}
    failed: dict[str, list[tuple[str, int, int]]] = {"missed": [], "unlocated": [], "read_anyway": []}
    spans: list[int] = []
    for _ in range(count):
        path = chance.choice(files)
        offset, mask = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        hits[_kind(path)] += 1
        with Flipped(path, offset, mask):
            problems = _problems(cache)
            span = _located(problems, path, offset)
            failed["missed"] += [] if problems else [(path.name, offset, mask)]
            failed["unlocated"] += [] if span else [(path.name, offset, mask)]
            failed["read_anyway"] += [(path.name, offset, mask)] if _readable(cache, splits) else []
            spans.append(span)
    spans.sort()
    return {
        "flips": count,
        "flips_by_file": hits,
        "detected": count - len(failed["missed"]),
        "located": count - len(failed["unlocated"]),
        "refused_by_reader": count - len(failed["read_anyway"]),
        "located_to_bytes": {"median": spans[count // 2], "most": spans[-1]},
        "cache_bytes": sum(path.stat().st_size for path in files),
        "bytes_per_token": {name: split.statistics["bytes_per_token"] for name, split in splits.items()},
        "files": len(files),
        **failed,
    }


class Flipped:
    """Changes one byte of a file for the length of a `with`."""

    def __init__(self, path: Path, offset: int, mask: int) -> None:
        self.path, self.offset, self.mask = path, offset, mask

    def __enter__(self) -> None:
        self._toggle()

    def __exit__(self, *_: object) -> None:
        self._toggle()

    def _toggle(self) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.offset)
            (byte,) = file.read(1)
            file.seek(self.offset)
            file.write(bytes([byte ^ self.mask]))


def _kind(path: Path) -> str:
    if path.name == MANIFEST_FILE:
        return "manifest"
    return "records" if path.suffix == ".json" else "shards"


def _problems(cache: Path) -> list[str]:
    try:
        return verify(cache)
    except IntegrityError as error:
        return [error.render()]


def _located(problems: list[str], path: Path, offset: int) -> int:
    """Bytes of the smallest stretch around `offset` that a problem names in this file; 0 where none does."""
    spans = []
    for problem in problems:
        if path.name not in problem:
            continue
        if path.name == MANIFEST_FILE:  # one digest covers it: it is named as a whole
            spans.append(path.stat().st_size)
        spans += [last - first + 1 for first, last in _ranges(problem) if first <= offset <= last]
    return min(spans, default=0)


def _ranges(problem: str) -> list[tuple[int, int]]:
    return [(int(first), int(last)) for first, last in RANGE.findall(problem)]


def _readable(cache: Path, splits: Iterable[str]) -> bool:
    """Whether a reader, which checks each shard when it opens it, gives every row without a word."""
    try:
        for split in splits:
            reader = SignalsReader(cache, split)
            for start in range(0, reader.rows, 64):
                rows = range(start, min(start + 64, reader.rows))
                reader.read(rows)
                if reader.manifest.layout.hidden is not None:
                    reader.hidden(rows)
    except IntegrityError:
        return False
    return True
