"""Whether a shard's bytes are those that were written, and where they are not.

A shard's record (`<shard>.json`) has a crc32 for each block of rows, so damage is named by shard and byte range.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from lmdistill.pipeline.files import sha256_file
from lmdistill.signals.format import Layout, ShardEntry, sha256_of


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
    return [*problems, *_bad_blocks(path, json.loads(record)["crc32"], layout, shard.first_row)]


def _bad_blocks(path: Path, crcs: list[int], layout: Layout, first_row: int) -> list[str]:
    size = layout.block_rows * layout.dtype.itemsize
    problems = []
    with path.open("rb") as file:
        for block, crc in enumerate(crcs):
            data = file.read(size)
            if zlib.crc32(data) != crc:
                row = first_row + block * layout.block_rows
                rows = len(data) // layout.dtype.itemsize
                problems.append(
                    f"{path.name}: block {block} (rows {row}–{row + rows - 1}), "
                    f"bytes {block * size}–{block * size + len(data) - 1}: crc32 differs"
                )
    return problems


def record_name(shard_file: str) -> str:
    """File name of a shard's record."""
    return Path(shard_file).with_suffix(".json").name
