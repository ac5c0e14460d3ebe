"""Two layouts that other tools keep teachers' log-probs in, written from their formulas, with nothing of theirs.

Axes: R rows, T tokens in a row, K entries of a token.
`fp16_u16_zstd`: log-probs in fp16, ids' lower 16 bits, their 17th bit, each row compressed by zstd at level 3.
`parquet_lists`: a record a row, its ids (int32) and log-probs (float32) as lists of lists, by pyarrow's defaults.
Neither keeps tokens, `lp_next` or the tail: the tail is the rest of 1, at least 1e-6, as `lmdistill cache import` does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmdistill.signals.codec import logsumexp
from teacher_cache.reading import READ_ROWS

Entries = tuple[NDArray[np.int32], NDArray[np.float32]]  # ids and log-probs [R, T, K]
LEAST_REST = 1e-6


def rest(logp_RTK: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tail's log mass `[R, T]` where only the entries are known."""
    tail_RT: NDArray[np.float32] = np.log(np.maximum(1 - np.exp(logsumexp(logp_RTK)), LEAST_REST)).astype(np.float32)
    return tail_RT


class Peer(ABC):
    """A file of rows `[T, K]` in one layout."""

    name: ClassVar[str]

    def __init__(self, path: Path, row_tokens: int, k: int) -> None:
        self.path, self.shape = path, (row_tokens, k)

    @abstractmethod
    def write(self, ids_RTK: NDArray[np.int32], logp_RTK: NDArray[np.float32]) -> None:
        """Write all rows."""

    @abstractmethod
    def batches(self) -> Iterator[Entries]:
        """All rows in order, READ_ROWS at a time, as arrays."""

    def speed(self, batches: Iterator[Entries]) -> float:
        """Tokens a second of this process' own time."""
        started, tokens = time.process_time(), 0
        for ids_RTK, _ in batches:
            tokens += ids_RTK.shape[0] * ids_RTK.shape[1]
        return tokens / (time.process_time() - started)


class Fp16U16Zstd(Peer):
    """Planes of a row, compressed together; their lengths stand before them all."""

    name = "fp16_u16_zstd"
    codec = pa.Codec("zstd", compression_level=3)

    def write(self, ids_RTK: NDArray[np.int32], logp_RTK: NDArray[np.float32]) -> None:
        """Write all rows."""
        blobs = []
        for ids_TK, logp_TK in zip(ids_RTK, logp_RTK, strict=True):
            planes = logp_TK.astype("<f2"), ids_TK.astype("<u2"), np.packbits((ids_TK >> 16).astype(bool))
            blobs.append(self.codec.compress(b"".join(plane.tobytes() for plane in planes), asbytes=True))
        sizes_R = np.array([len(blob) for blob in blobs], "<u4")
        self.path.write_bytes(np.uint32(len(blobs)).tobytes() + sizes_R.tobytes() + b"".join(blobs))

    def batches(self) -> Iterator[Entries]:
        """Decompress, split into planes, widen."""
        entries = self.shape[0] * self.shape[1]
        size = 4 * entries + -(-entries // 8)
        with self.path.open("rb") as file:
            rows = int(np.frombuffer(file.read(4), "<u4")[0])
            sizes_R = np.frombuffer(file.read(4 * rows), "<u4").tolist()
            for start in range(0, rows, READ_ROWS):
                blobs = [self.codec.decompress(file.read(n), size) for n in sizes_R[start : start + READ_ROWS]]
                yield self._decoded(np.stack([np.frombuffer(blob, np.uint8) for blob in blobs]), entries)

    def _decoded(self, planes_RX: NDArray[np.uint8], entries: int) -> Entries:
        shape = (len(planes_RX), *self.shape)
        logp = np.ascontiguousarray(planes_RX[:, : 2 * entries]).view("<f2").astype(np.float32)
        ids = np.ascontiguousarray(planes_RX[:, 2 * entries : 4 * entries]).view("<u2").astype(np.int32)
        high = planes_RX[:, 4 * entries :]
        if high.any():
            ids += np.unpackbits(high, axis=1, count=entries).astype(np.int32) << 16
        return ids.reshape(shape), logp.reshape(shape)


class ParquetLists(Peer):
    """Records with nested lists."""

    name = "parquet_lists"

    def write(self, ids_RTK: NDArray[np.int32], logp_RTK: NDArray[np.float32]) -> None:
        """Write all rows."""
        table = pa.table({"token_ids": _nested(ids_RTK), "top_values": _nested(logp_RTK)})
        pq.write_table(table, self.path)

    def batches(self) -> Iterator[Entries]:
        """By the lists' flat values: nothing becomes a Python object."""
        for records in self._records():
            ids, logp = (records.column(name).flatten().flatten().to_numpy() for name in ("token_ids", "top_values"))
            shape = (records.num_rows, *self.shape)
            yield ids.reshape(shape), logp.reshape(shape)

    def batches_by_lists(self) -> Iterator[Entries]:
        """By Python lists, as data sets hand out records."""
        for records in self._records():
            ids, logp = (records.column(name).to_pylist() for name in ("token_ids", "top_values"))
            yield np.asarray(ids, np.int32), np.asarray(logp, np.float32)

    def _records(self) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=READ_ROWS, use_threads=False)


def _nested(values_RTK: NDArray[Any]) -> pa.Array:
    """`[R, T, K]` as R lists of T lists of K."""
    rows, length, k = values_RTK.shape
    inner = pa.ListArray.from_arrays(np.arange(0, values_RTK.size + 1, k, dtype=np.int32), values_RTK.reshape(-1))
    return pa.ListArray.from_arrays(np.arange(0, rows * length + 1, length, dtype=np.int32), inner)


PEERS: tuple[type[Peer], ...] = (Fp16U16Zstd, ParquetLists)
