"""DistillKit's captured log-probs as documents: its three layouts, packed rows taken apart.

Axes: P positions with log-probs, K entries, L tokens of a document.
`input_ids`, and beside them either `compressed_logprobs` with `bytepacked_indices`, or the older `packed_indices`,
`exact_values` and `coeffs`, or plain `token_ids` with `top_values`. Row p predicts token p+1; the last token's row may
be missing. In rows that were packed, `attention_mask` numbers the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError
from lmdistill.signals.exchange.distillkit_codec import (
    CONFIG_FILE,
    Compression,
    LegacyCompression,
    load_config,
    plausible,
    unpack_bits,
)
from lmdistill.signals.exchange.document import TAIL_FLOOR, Document, Entries
from lmdistill.signals.exchange.source import Ragged, Record, field_names, read

LAYOUTS = {
    "compressed": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "plain": ("token_ids", "top_values"),
}
TOKENS = ("input_ids", "attention_mask", "labels", "text")
IGNORED = -100  # a label that is no target


@dataclass(frozen=True)
class DistillKit:
    """A data set of captured log-probs."""

    files: Sequence[Path]
    settings: Compression | LegacyCompression | None
    layout: str
    pad_id: int | None  # padding that ends no text; None: the tokenizer has none

    @classmethod
    def open(cls, source: Path, files: Sequence[Path], config: Path | None, pad_id: int | None) -> DistillKit:
        """Find layout and settings; raises PreflightError where a field or the settings are missing."""
        names = field_names(files)
        layout = next((name for name, fields in LAYOUTS.items() if set(fields) <= set(names)), None)
        if layout is None or "input_ids" not in names:
            wanted = ", or ".join(" with ".join(fields) for fields in LAYOUTS.values())
            raise PreflightError(
                f"{files[0]} is no DistillKit capture",
                why=f"its fields are {', '.join(names)}; expected input_ids and {wanted}",
                fix="check --format",
            )
        if layout == "plain":
            return cls(files, None, layout, pad_id)
        beside = (source if source.is_dir() else source.parent) / CONFIG_FILE
        if config is None and not beside.exists():
            raise PreflightError(
                f"how the log-probs in {source} were compressed is not known",
                why=f"there is no {CONFIG_FILE} beside them",
                fix="give the configuration of the capture with --config",
            )
        settings = load_config(config or beside)
        if isinstance(settings, LegacyCompression) != (layout == "legacy"):
            raise PreflightError(
                f"{config or beside} is not of this capture",
                why=f"the data has {', '.join(LAYOUTS[layout])}",
                fix="give the configuration of the capture with --config",
            )
        return cls(files, settings, layout, pad_id)

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary the capture was made for, where it says."""
        return None if self.settings is None else self.settings.d

    def documents(self) -> Iterator[Document]:
        """Every document in order; its log-probs are decoded when they are asked for."""
        for record in read(self.files, [*TOKENS, *LAYOUTS[self.layout]]):
            yield from self._documents(record)

    def texts(self) -> Iterator[tuple[str, NDArray[np.int64], str]]:
        """Place, tokens and text of records that have their text."""
        for record in read(self.files, ["input_ids", "text"]):
            text = record.plain("text") if "text" in record else ""
            if text and isinstance(text, str):
                yield f"{record.file}, row {record.row}", record.vector("input_ids"), text

    def entries_per_position(self) -> tuple[int, int]:
        """The fewest and the most entries that a position has."""
        if self.settings is not None:
            return self.settings.k, self.settings.k
        lengths = [record.ragged("token_ids", "lists of ids").lengths for record in read(self.files, ["token_ids"])]
        every = np.concatenate([found[found > 0] for found in lengths] or [np.zeros(1, np.int64)])
        return (int(every.min()), int(every.max())) if len(every) else (0, 0)

    def _documents(self, record: Record) -> Iterator[Document]:
        if "input_ids" not in record:
            record.fail("input_ids", "is missing", "the tokens")
        ids_L = record.vector("input_ids")
        length, first = len(ids_L), LAYOUTS[self.layout][0]
        rows = self._rows(record, first, length)
        scored_L = np.arange(length) < rows
        targets_L, decoded = self._targets(record, ids_L), cache(partial(self._decoded, record))
        for span in self._spans(record, length):
            if span.stop - span.start > 1:
                yield Document(
                    f"{record.file}, row {record.row}",
                    ids_L[span],
                    targets_L[span],
                    scored_L[span],
                    partial(_entries, decoded, span, rows),
                )

    def _rows(self, record: Record, field: str, length: int) -> int:
        """Positions with log-probs: as many as tokens, or one fewer."""
        if field not in record:
            record.fail(field, "is missing", f"a list for each of {length} tokens")
        rows = record.rows(field)
        if not length or rows not in (length, length - 1):
            record.fail(field, f"has {rows} rows", f"one for each of {length} tokens, or all but the last")
        return rows

    def _targets(self, record: Record, ids_L: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens can be targets: those with a label, without the padding that a capture puts behind a text."""
        if "labels" in record:
            labels_L = record.vector("labels")
            if labels_L.shape != ids_L.shape:
                record.fail("labels", f"has {len(labels_L)} entries", f"one for each of {len(ids_L)} tokens")
            labelled_L: NDArray[np.bool_] = labels_L != IGNORED
            return labelled_L
        targets_L = np.ones(len(ids_L), bool)
        real = np.flatnonzero(ids_L != self.pad_id) if self.pad_id is not None else np.arange(len(ids_L))
        targets_L[int(real[-1]) + 1 if len(real) else 0 :] = False
        return targets_L

    def _spans(self, record: Record, length: int) -> Iterator[slice]:
        """The documents of a record: runs of one number in `attention_mask`, 0 being padding."""
        mask_L = record.vector("attention_mask") if "attention_mask" in record else np.ones(length, np.int64)
        if len(mask_L) != length:
            record.fail("attention_mask", f"has {len(mask_L)} entries", f"one for each of {length} tokens")
        edges = [0, *(np.flatnonzero(np.diff(mask_L)) + 1).tolist(), length]
        for start, stop in pairwise(edges):
            if mask_L[start] != 0:
                yield slice(start, stop)

    def _decoded(self, record: Record) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and log-probs `[P, K]` of a record."""
        columns = {name: self._column(record, name) for name in LAYOUTS[self.layout]}
        if isinstance(self.settings, Compression):
            data = self._dense(record, columns, "compressed_logprobs", self.settings.position_bytes)
            packed = -(-self.settings.k * self.settings.id_bits // 8)
            bits = self._dense(record, columns, "bytepacked_indices", packed).astype(np.uint8)
            ids_PK = unpack_bits(bits, self.settings.id_bits, self.settings.k).astype(np.int64)
            return ids_PK, self._in_bounds(self.settings.logprobs(data.astype(np.uint8)))
        if isinstance(self.settings, LegacyCompression):
            words = self._dense(record, columns, "packed_indices", self.settings.words)
            exact = self._dense(record, columns, "exact_values", self.settings.exact_k)
            curve = self._dense(record, columns, "coeffs", self.settings.terms)
            ids_PK = self.settings.ids(words.astype(np.uint64))
            return ids_PK, self._in_bounds(self.settings.logprobs(exact, curve))
        ids, values = columns["token_ids"], columns["top_values"]
        if (ids.lengths != values.lengths).any():
            record.fail("top_values", "has other lengths than token_ids", "a log-prob for each id")
        widest = int(ids.lengths.max(initial=1))
        logp = values.dense(widest, -np.inf) if values.values.dtype.kind == "f" else values.dense(widest, -1)
        return ids.dense(widest, 0).astype(np.int64), logp.astype(np.float32)

    def _in_bounds(self, logp_PK: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fitted values as probabilities can be; exact ones as they are."""
        exact_k = logp_PK.shape[1] if self.settings is None else self.settings.exact_k
        return logp_PK if exact_k == logp_PK.shape[1] else plausible(logp_PK, exact_k, 1 - TAIL_FLOOR)

    @staticmethod
    def _column(record: Record, name: str) -> Ragged:
        if name not in record:
            record.fail(name, "is missing", "a list for each token")
        return record.ragged(name, "a list of numbers for each token")

    @staticmethod
    def _dense(record: Record, columns: dict[str, Ragged], name: str, width: int) -> NDArray[Any]:
        lengths = columns[name].lengths
        if (lengths != width).any():
            position = int(np.flatnonzero(lengths != width)[0])
            record.fail(
                name,
                f"has {lengths[position]} values at position {position}",
                f"{width}, as the capture's settings say: these are of another capture, or the row is cut",
            )
        return columns[name].values.reshape(len(lengths), width)


def _entries(decoded: Callable[[], tuple[NDArray[np.int64], NDArray[np.float32]]], span: slice, rows: int) -> Entries:
    """A document's part of a record; positions without log-probs are −inf throughout."""
    ids_PK, logp_PK = decoded()
    missing = ((0, span.stop - min(span.stop, rows)), (0, 0))
    return Entries(np.pad(ids_PK[span], missing), np.pad(logp_PK[span], missing, constant_values=-np.inf))
