"""Whether a shard's bytes are those that were written, and where they are not.

A shard's record (`<shard>.json`) has a crc32 for each block, so damage is named by shard and byte range.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.files import sha256_file
from lmdistill.signals import variant as variants
from lmdistill.signals.format import Layout, ShardEntry, record_name, sha256_of


def shard_problems(folder: Path, shard: ShardEntry, layout: Layout) -> list[str]:
    """Compare a shard and its record with the manifest; each problem names the file and the bytes."""
    record_path, path = folder / record_name(shard.file), folder / shard.file
    problems = []
    record = record_path.read_bytes() if record_path.exists() else None
    if record is None:
        problems.append(f"{record_path.name}: missing")
    elif sha256_of(record) != shard.record_sha256:
        problems.append(f"{record_path.name}: bytes 0–{len(record) - 1}: not the record that was written")
        record = None
    if not path.exists():
        return [*problems, f"{shard.file}: missing"]
    if path.stat().st_size != shard.bytes:
        return [*problems, f"{shard.file}: {path.stat().st_size} bytes, not {shard.bytes}"]
    if sha256_file(path) == shard.sha256:
        return problems
    if record is None:
        return [*problems, f"{shard.file}: bytes 0–{shard.bytes - 1}: sha256 differs"]
    return [*problems, *_bad_blocks(path, json.loads(record), layout, shard)]


def _bad_blocks(path: Path, record: dict[str, Any], layout: Layout, shard: ShardEntry) -> list[str]:
    problems = []
    blocks = variants.get(layout.variant).blocks(layout, shard.rows, record)
    with path.open("rb") as file:
        for index, block in enumerate(blocks):
            if zlib.crc32(file.read(block.stop - block.start)) != block.crc:
                first, rows = shard.first_row, block.rows
                content = f"rows {first + rows[0]}–{first + rows[-1]}" if rows else "tables"
                span = f"bytes {block.start}–{block.stop - 1}"
                problems.append(f"{path.name}: block {index} ({content}), {span}: crc32 differs")
    return problems


def unknown_next(folder: Path, fix: str) -> IntegrityError:
    """What to raise where a teacher's log-prob of the text's token is wanted, and the cache in `folder` has none."""
    return IntegrityError(
        f"{folder} does not say how likely the teacher found the tokens of the text",
        why="caches from elsewhere may lack the log-prob of a token that is not among their entries",
        fix=f"{fix}, or capture the teacher with the teach stage",
    )
