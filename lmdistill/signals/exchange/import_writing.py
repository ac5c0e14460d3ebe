"""An import's second reading: documents into rows, rows into the shards of a cache.

Axes: R rows, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import LOSS, PAD, TRAIN, VALID
from lmdistill.signals import variant as variants
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.exchange.document import Reading
from lmdistill.signals.exchange.offsets import Offsets
from lmdistill.signals.exchange.placing import Row, predictions_of_row, tokens_of_rows
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.signals.shard_work import Meter
from lmdistill.signals.writer import ShardJob, ShardRecord, ShardWriter, finished_shard, plan_shards, source_digest

SHARD_BYTES = 2**26


@dataclass
class Writing:
    """The second reading: rows into shards."""

    target: Path
    layout: Layout
    teacher: TeacherInfo
    reading: Reading
    offsets: Offsets
    pad_id: int
    meter: Meter

    @property
    def shard_rows(self) -> int:
        """As many as make a shard of about SHARD_BYTES."""
        return max(1, SHARD_BYTES // variants.get("mmap").dtype(self.layout).itemsize)

    def run(self, rows: Iterator[tuple[str, Row]], counts: dict[str, int]) -> dict[str, list[ShardRecord]]:
        """Write every shard whose rows are together; train first in the manifest."""
        order = [name for name in (TRAIN, VALID) if name in counts]
        jobs = {name: iter(plan_shards(name, counts[name], self.shard_rows)) for name in order}
        current = {name: next(jobs[name]) for name in order}
        waiting: dict[str, list[Row]] = {name: [] for name in order}
        records: dict[str, list[ShardRecord]] = {name: [] for name in order}
        for split, row in rows:
            waiting[split].append(row)
            if len(waiting[split]) == current[split].rows:
                records[split].append(self._shard(current[split], waiting[split]))
                waiting[split] = []
                current[split] = next(jobs[split], current[split])
        return records

    def _shard(self, job: ShardJob, rows: list[Row]) -> ShardRecord:
        tokens_RT, flags_RT = tokens_of_rows(rows, self.layout.row_tokens, self.pad_id)
        source = source_digest(self.layout, self.teacher, tokens_RT, flags_RT)
        record, _ = finished_shard(self.target, job, self.layout, source)
        if record is None:
            writer = ShardWriter(self.target, job, self.layout, source)
            for index, row in enumerate(rows):
                self._row(writer, row, tokens_RT[index : index + 1], flags_RT[index : index + 1])
                rows[index] = []  # what was decoded of it is not held
            record = writer.commit()
        self.meter.add(tokens_RT.size)
        return record

    def _row(self, writer: ShardWriter, row: Row, tokens_RT: NDArray[Any], flags_RT: NDArray[np.uint8]) -> None:
        """Code one row; statistics are over what the source scored."""
        exact, scored_RT = predictions_of_row(row, self.layout.row_tokens, self.reading)
        start = 0
        for document in row:
            stop = start + min(len(document.ids_L), self.layout.row_tokens)
            self.offsets.add(document, exact.ids_BTK[0, start:stop])
            start = stop
        variant = variants.get(self.layout.variant)
        raw_R = variant.code(self.layout, tokens_RT, flags_RT, exact)
        decoded = SignalsBatch.empty(np.zeros(1, np.int64), self.layout.row_tokens, self.layout.k)
        writer.refuse(variant.decode(self.layout, raw_R, decoded))
        counted_RT = np.where(scored_RT, flags_RT, flags_RT | PAD).astype(np.uint8)
        writer.statistics.add(tokens_RT, counted_RT, exact, decoded.logp_RTK, decoded.tail_RT)
        writer.statistics.targets += int((((flags_RT & LOSS) != 0) & np.isnan(exact.lp_next_BT)).sum())
        writer.append_coded(raw_R)
