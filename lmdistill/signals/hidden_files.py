"""Hidden states on disk: a file beside each shard, under the same discipline; writing, checking, reading.

Axes: R rows, T tokens in a row, L chosen layers, D hidden width.
`<split>-00000.hid` holds the rows of `<split>-00000.sig` one after another, no header. What proves it (size, sha256, a
crc32 for every BLOCK_BYTES) is in that shard's record, which is written last and whose sha256 is in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError, StageError
from lmdistill.pipeline.files import sha256_file
from lmdistill.signals.format import Layout, ShardEntry, record_name, sha256_of
from lmdistill.signals.hidden import F32, HiddenLayout
from lmdistill.signals.mapped import MappedFiles
from lmdistill.teachers.engine import TopK, TopKWithHidden

BLOCK_BYTES = 65_536  # a flipped byte is located to about this many bytes


def hidden_name(shard_file: str) -> str:
    """File name of a shard's hidden states."""
    return Path(shard_file).with_suffix(".hid").name


class HiddenWriter:
    """Writes the hidden states of one shard in order, beside it; the caller turns OSError into advice."""

    def __init__(self, folder: Path, shard_file: str, layout: HiddenLayout, writer_id: str) -> None:
        self._layout = layout
        self._path = folder / hidden_name(shard_file)
        self._part = folder / f".{self._path.name}{writer_id}.tmp"
        self._sha, self._crcs, self._bytes = hashlib.sha256(), list[int](), 0
        self._file: BinaryIO | None = None

    def append(self, exact: TopK) -> None:
        """Encode and write the next rows; raises StageError where the engine gave other hidden states than asked."""
        wanted = (*exact.lp_next_BT.shape, len(self._layout.layers), self._layout.width)
        if not isinstance(exact, TopKWithHidden) or exact.hidden_BTLD.shape != wanted:
            raise StageError(f"the teacher engine gave no hidden states of shape {wanted}")
        self.append_coded(self._layout.encode(exact.hidden_BTLD))

    def append_coded(self, raw_R: NDArray[Any]) -> None:
        """Write rows that are encoded already."""
        data = raw_R.tobytes()
        if self._file is None:
            self._file = self._part.open("wb")
        self._file.write(data)
        self._sha.update(data)
        self._sum(memoryview(data))

    def commit(self) -> dict[str, Any]:
        """Make the file durable under its final name; what the shard's record says of it."""
        assert self._file is not None  # a shard has rows
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._part.replace(self._path)
        return {"bytes": self._bytes, "sha256": self._sha.hexdigest(), "crc32": self._crcs}

    def drop(self) -> None:
        """Give an unfinished file's space back."""
        with contextlib.suppress(OSError):  # what is buffered cannot be written either
            if self._file is not None:
                self._file.close()
        self._part.unlink(missing_ok=True)

    def _sum(self, data: memoryview) -> None:
        """Go on with the crc32 of the block that is open, and with new ones."""
        while data:
            room = BLOCK_BYTES - self._bytes % BLOCK_BYTES
            if room == BLOCK_BYTES:
                self._crcs.append(0)
            self._crcs[-1] = zlib.crc32(data[:room], self._crcs[-1])
            self._bytes += len(data[:room])
            data = data[room:]


def hidden_problems(folder: Path, shard: ShardEntry, layout: Layout) -> list[str]:
    """Compare a shard's hidden states with its record; each problem names the bytes.

    A record that is damaged itself proves nothing and is not complained of here: `shard_problems` does.
    """
    path, record_path = folder / hidden_name(shard.file), folder / record_name(shard.file)
    if layout.hidden is None or not record_path.exists():
        return []
    written = record_path.read_bytes()
    if sha256_of(written) != shard.record_sha256:
        return []
    record: dict[str, Any] = json.loads(written)["hidden"]
    if not path.exists():
        return [f"{path.name}: missing"]
    if path.stat().st_size != record["bytes"]:
        return [f"{path.name}: {path.stat().st_size} bytes, not {record['bytes']}"]
    if sha256_file(path) == record["sha256"]:
        return []
    row_bytes = layout.hidden.row_dtype(layout.row_tokens).itemsize
    problems = []
    with path.open("rb") as file:
        for block, crc in enumerate(record["crc32"]):
            data = file.read(BLOCK_BYTES)
            start, stop = block * BLOCK_BYTES, block * BLOCK_BYTES + len(data)
            if zlib.crc32(data) != crc:
                first, last = (shard.first_row + byte // row_bytes for byte in (start, stop - 1))
                problems.append(
                    f"{path.name}: block {block} (rows {first}–{last}), bytes {start}–{stop - 1}: crc32 differs"
                )
    return problems


class HiddenReader:
    """Hidden states of a split's rows; a shard's file is checked when it is first opened."""

    def __init__(self, folder: Path, layout: Layout, shards: tuple[ShardEntry, ...]) -> None:
        """Raises IntegrityError where the cache holds no hidden states."""
        if layout.hidden is None:
            raise IntegrityError(
                f"the teacher cache {folder} holds no hidden states",
                fix="add `hidden_layers` to the teach stage and run it again",
            )
        self._folder, self._layout, self._shards = folder, layout, shards
        self._firsts = [shard.first_row for shard in shards]
        self._hidden = layout.hidden
        self._open: dict[int, NDArray[Any]] = {}
        self._files = MappedFiles()

    def __getstate__(self) -> dict[str, Any]:
        """Workers of a data loader open the files themselves."""
        return {**self.__dict__, "_open": {}, "_files": MappedFiles()}

    def read(self, rows: NDArray[np.int64], verify: bool) -> F32:
        """`[R, T, L, D]` in float32, in the asked order; raises IntegrityError for damaged files."""
        raw = np.empty(len(rows), self._hidden.row_dtype(self._layout.row_tokens))
        for place, row in enumerate(rows.tolist()):
            index = bisect_right(self._firsts, row) - 1
            raw[place] = self._rows(index, verify)[row - self._shards[index].first_row]
            self._files.note(self._path(index), raw.itemsize)
        return self._hidden.decode(raw)

    def _rows(self, index: int, verify: bool) -> NDArray[Any]:
        if index not in self._open:
            shard = self._shards[index]
            problems = hidden_problems(self._folder, shard, self._layout) if verify else []
            if problems:
                raise IntegrityError(
                    f"the hidden states of shard {shard.file} of {self._folder} are damaged",
                    why="; ".join(problems[:4]),
                    fix="run the teach stage again: this shard alone is recomputed",
                )
            dtype = self._hidden.row_dtype(self._layout.row_tokens)
            self._open[index] = self._files.open(self._path(index)).view(dtype)
        return self._open[index]

    def _path(self, index: int) -> Path:
        return self._folder / hidden_name(self._shards[index].file)
