"""axolotl's distillation data as documents: prepared rows with target_* fields, or conversations with log-probs.

Axes: L tokens of a document, P positions with log-probs, E entries.
Prepared: `input_ids`, `labels`, `target_token_ids`, `target_logprobs`, `target_mask`, one row a token; row j predicts
token j+1, or (older releases) describes token j. Conversations: `messages` and a field with a list for each token that
the teacher wrote: of `{"token": "token_id:N", "logprob": x}`, of plain log-probs beside `target_token_ids`, or of a
chat server's `{"token", "logprob", "top_logprobs"}`. Where those tokens stand in the rendered conversation is found
from the entries themselves, each of which holds the token that was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.encode import Encoder
from lmdistill.errors import PreflightError
from lmdistill.signals.exchange.document import Document, Entries
from lmdistill.signals.exchange.source import Ragged, Record, field_names, read
from lmdistill.signals.exchange.token_names import TokenNames

PREPARED = ("input_ids", "target_token_ids", "target_logprobs")
ABSENT = -1e8  # log-probs below are axolotl's padding
IGNORED = -100  # a label that is no target
TRAILING = 8  # tokens that a template may put behind the last one that was written
FITTING = 0.9  # of the written tokens must be among their entries
NAMES = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant"}
Rows = tuple[Ragged, Ragged]  # ids and log-probs


@dataclass
class Axolotl:
    """A data set of conversations or prepared rows with log-probs."""

    files: Sequence[Path]
    tokenizer_folder: Path
    alignment: str = "next"
    logprobs_field: str = "logprobs"
    messages_field: str = "messages"
    drop_unmatched: bool = False
    unmatched: list[str] = field(default_factory=list)  # conversations that were left out
    prepared: bool = False

    def __post_init__(self) -> None:
        """Find which of the two it is; raises PreflightError where it is neither."""
        names = field_names(self.files)
        self.prepared = set(PREPARED) <= set(names)
        if not self.prepared and not {self.logprobs_field, self.messages_field} <= set(names):
            raise PreflightError(
                f"{self.files[0]} is no axolotl distillation data",
                why=f"its fields are {', '.join(names)}; expected {', '.join(PREPARED)}, "
                f"or {self.messages_field} with {self.logprobs_field}",
                fix="name the fields with --messages-field and --logprobs-field, or check --format",
            )
        self._names = TokenNames(self.tokenizer_folder)
        self._encoder = Encoder(
            str(self.tokenizer_folder),
            self.messages_field,
            is_chat=True,
            group=None,
            assistant_only=True,
            separator_id=None,
            separator_first=False,
            parallel=False,
        )

    @property
    def vocab_size(self) -> int | None:
        """The data does not say."""
        return None

    def texts(self) -> Iterator[tuple[str, NDArray[np.int64], str]]:
        """Nothing: the data has no text beside its tokens."""
        yield from ()

    def documents(self) -> Iterator[Document]:
        """Every document in order."""
        self.unmatched.clear()
        for record in read(self.files):
            document = self._prepared(record) if self.prepared else self._conversation(record)
            if document is not None:
                yield document

    def entries_per_position(self) -> tuple[int, int]:
        """The fewest and the most entries that a scored position has."""
        fewest, most = 2**31, 0
        for document in self.documents():
            counts = np.isfinite(document.entries().logp_LE[document.scored_L]).sum(axis=1)
            fewest, most = min(fewest, *counts.tolist(), 2**31), max(most, *counts.tolist(), 0)
        return (fewest, most) if most else (0, 0)

    def _prepared(self, record: Record) -> Document | None:
        for name in PREPARED:
            if name not in record:
                record.fail(name, "is missing", "one row for each token")
        ids_L = record.vector("input_ids")
        length = len(ids_L)
        ids, logp = (record.ragged(name, "a list of numbers for each token") for name in PREPARED[1:])
        mask = record.ragged("target_mask", "a list of 0 and 1 for each token") if "target_mask" in record else None
        for name, found in (("target_logprobs", logp), ("target_mask", mask or ids), ("target_token_ids", ids)):
            if len(found.lengths) != length:
                record.fail(name, f"has {len(found.lengths)} rows", f"one for each of {length} tokens")
            if (found.lengths != ids.lengths).any():
                position = int(np.flatnonzero(found.lengths != ids.lengths)[0])
                record.fail(name, f"has another number of entries at position {position}", "those of target_token_ids")
        entries = _entries((ids, logp))
        if mask is not None:
            entries.logp_LE[mask.dense(entries.ids_LE.shape[1], 0) == 0] = -np.inf
        if self.alignment == "same":  # row j is of token j: position j−1 predicts it
            last = np.full_like(entries.logp_LE[:1], -np.inf)
            entries = Entries(np.roll(entries.ids_LE, -1, axis=0), np.concatenate([entries.logp_LE[1:], last]))
        return _document(record, ids_L, self._labelled(record, ids_L), entries)

    def _labelled(self, record: Record, ids_L: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tokens with a label; labels that are other tokens are shifted, or of other tokens."""
        if "labels" not in record:
            return np.ones(len(ids_L), bool)
        labels_L = record.vector("labels")
        if labels_L.shape != ids_L.shape:
            record.fail("labels", f"has {len(labels_L)} entries", f"one for each of {len(ids_L)} tokens")
        wrong = np.flatnonzero((labels_L != IGNORED) & (labels_L != ids_L))
        if len(wrong):
            at = int(wrong[0])
            record.fail("labels", f"is {labels_L[at]} at position {at}", f"the token there, {ids_L[at]}, or {IGNORED}")
        labelled_L: NDArray[np.bool_] = labels_L != IGNORED
        return labelled_L

    def _conversation(self, record: Record) -> Document | None:
        for name in (self.messages_field, self.logprobs_field):
            if name not in record:
                record.fail(name, "is missing", "a conversation, and log-probs for each token the teacher wrote")
        ids_L, targets_L = self._rendered(record)
        written = _entries(self._written(record))
        first = _place(ids_L, written)
        if first is None:
            if not self.drop_unmatched:
                record.fail(
                    self.logprobs_field,
                    "does not fit the conversation",
                    f"{len(written.ids_LE)} positions, each with the token of the rendered conversation "
                    f"({len(ids_L)} tokens) among its entries; --drop-unmatched leaves such records out",
                )
            self.unmatched.append(f"{record.file}, row {record.row}")
            return None
        rows = slice(max(first - 1, 0), first - 1 + len(written.ids_LE))  # position t predicts token t+1
        skipped = 1 if first == 0 else 0  # nothing predicts the first token
        ids_LE = np.zeros((len(ids_L), written.ids_LE.shape[1]), np.int64)
        logp_LE = np.full(ids_LE.shape, -np.inf, np.float32)
        ids_LE[rows], logp_LE[rows] = written.ids_LE[skipped:], written.logp_LE[skipped:]
        return _document(record, ids_L, targets_L, Entries(ids_LE, logp_LE))

    def _rendered(self, record: Record) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens of the conversation under the tokenizer's chat template, and which the assistant wrote."""
        found = self._encoder({self.messages_field: [_messages(record.plain(self.messages_field))]})
        if found["problem"][0]:
            record.fail(self.messages_field, found["problem"][0], "a list of {role, content}")
        return np.array(found["ids"][0], np.int64), np.array(found["targets"][0], bool)

    def _written(self, record: Record) -> Rows:
        """The entries of each token the teacher wrote."""
        place, expected = f"{record.file}, row {record.row}", "a list of {token, logprob} for each written token"
        if "target_token_ids" in record:
            ids, logp = record.ragged("target_token_ids", "lists of ids"), record.ragged(self.logprobs_field, expected)
            if len(ids.lengths) != len(logp.lengths) or (ids.lengths != logp.lengths).any():
                record.fail(self.logprobs_field, "has other lengths than target_token_ids", "a log-prob for each id")
            return ids, logp
        rows = record.plain(self.logprobs_field)
        if isinstance(rows, dict):
            rows = rows.get("content")  # as a chat server answers
        if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], list) and _is_row(rows[0][:1]):
            rows = rows[0]  # one answer of several
        try:
            pairs = [[(entry["token"], float(entry["logprob"])) for entry in _row(row)] for row in rows]
        except (TypeError, KeyError, ValueError):
            record.fail(self.logprobs_field, "cannot be read", expected)
        lengths = np.array([len(row) for row in pairs], np.int64)
        numbers = np.array(self._names.ids([token for row in pairs for token, _ in row], place), np.int64)
        return Ragged(numbers, lengths), Ragged(np.array([x for row in pairs for _, x in row]), lengths)


def _messages(value: Any) -> Any:
    """A conversation with the names of chat templates; what is none is left for the renderer to refuse."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    return [
        {NAMES.get(name, name): ROLES.get(said, said) if name == "from" else said for name, said in turn.items()}
        for turn in value
    ]


def _is_row(rows: list[Any]) -> bool:
    return bool(rows) and isinstance(rows[0], list)


def _row(row: Any) -> list[Any]:
    """The entries of a position; a chat server names the token that was written apart from the likely ones."""
    if not isinstance(row, dict):
        return list(row or ())
    likely = list(row.get("top_logprobs") or ())
    return likely if any(entry["token"] == row["token"] for entry in likely) else [*likely, row]


def _entries(rows: Rows) -> Entries:
    ids, logp = rows
    widest = max(1, int(ids.lengths.max(initial=1)))
    dense = Ragged(logp.values.astype(np.float32), logp.lengths).dense(widest, -np.inf)
    dense[dense < ABSENT] = -np.inf
    return Entries(ids.dense(widest, 0).astype(np.int64), dense)


def _place(ids_L: NDArray[np.int64], written: Entries) -> int | None:
    """At which token the written ones begin: where nearly all are among their own entries; None where nowhere."""
    count, length = len(written.ids_LE), len(ids_L)
    there_PE = np.isfinite(written.logp_LE)
    judged_P = there_PE.any(axis=1)
    best, place = 0.0, None
    for first in range(length - count, max(-1, length - count - TRAILING - 1), -1):
        if count and judged_P.any():
            same_P = ((written.ids_LE == ids_L[first : first + count, None]) & there_PE).any(axis=1)
            share = float(same_P[judged_P].mean())
            best, place = (share, first) if share > best else (best, place)
    return place if best >= FITTING else None


def _document(
    record: Record, ids_L: NDArray[np.int64], targets_L: NDArray[np.bool_], entries: Entries
) -> Document | None:
    if len(ids_L) < 2:
        return None
    scored_L = np.asarray((~np.isneginf(entries.logp_LE)).any(axis=1))
    return Document(f"{record.file}, row {record.row}", ids_L, targets_L, scored_L, lambda: entries)
