"""Records to token ids, which of them are targets, and the keys for deduplication and splitting, in parallel.

Text is tokenised with special tokens in it read as plain text, so that no document can forge one; conversations are
rendered by the chat template first, whose special tokens count, and end as it ends them: no separator follows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdistill.corpus.config import Source
from lmdistill.corpus.render import UnrenderableError, clean, render
from lmdistill.errors import PreflightError

KEY_BYTES = 16  # of sha256: text and group keys
BATCH = 256  # records
RECORDS_PER_WORKER = 2000  # fewer do not pay for another process


def key_of(value: Any) -> bytes:
    """The first KEY_BYTES of sha256 over a string, or over the canonical JSON of anything else."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def _share(value: Any) -> float | None:
    """A number from 0 to 1 as it is; None for anything else."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


@dataclass
class Encoder:
    """Encodes batches of one source's records; made anew in every worker process.

    Columns: `ids` list of u32, `targets` list of bool (may the token be a target), `text_key`, `group_key`,
    `success` (f32, NaN where none is told), `problem` (empty, or why the record cannot be used).
    A record without text has no ids.
    """

    tokenizer_folder: str
    field_name: str
    is_chat: bool
    group: str | None
    assistant_only: bool
    separator_id: int | None
    separator_first: bool
    parallel: bool
    success: str | None = None
    _tokenizer: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded tokenizer: it is read again where it is needed."""
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode one batch of records."""
        values = batch[self.field_name]
        encoded = self._conversations(values) if self.is_chat else self._texts(values)
        keys = [key_of(value) if value is not None else b"\0" * KEY_BYTES for value in values]
        groups = keys if self.group is None else [key_of(["group", value]) for value in batch[self.group]]
        self._graded(encoded, batch)
        return {**encoded, "text_key": keys, "group_key": groups}

    def _graded(self, encoded: dict[str, list[Any]], batch: dict[str, list[Any]]) -> None:
        """Add the column `success`, and to `problem` what is no success rate."""
        encoded["success"] = [math.nan] * len(encoded["problem"])
        if self.success is None:
            return
        fault = f"has no success rate from 0 to 1 in '{self.success}' beside it"
        for place, value in enumerate(batch[self.success]):
            share = _share(value)
            encoded["success"][place] = share
            encoded["problem"][place] = encoded["problem"][place] or (fault if share is None else "")

    def _backend(self, special: bool) -> Any:
        if self._tokenizer is None:
            if self.parallel:  # several processes already: no threads inside each
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
            from lmdistill.checkpoints import load_tokenizer

            self._tokenizer = load_tokenizer(Path(self.tokenizer_folder))
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.encode_special_tokens = not special
        return backend

    def _texts(self, values: list[Any]) -> dict[str, list[Any]]:
        problems = ["" if isinstance(v, str | None) else f"is a {type(v).__name__}, not text" for v in values]
        texts = [value if isinstance(value, str) else "" for value in values]
        encodings = self._backend(special=False).encode_batch_fast(texts, add_special_tokens=False)
        ids = [self._with_separator(encoding.ids) for encoding in encodings]
        targets = [[False] + [True] * (len(document) - 1) if document else [] for document in ids]
        return {"ids": ids, "targets": targets, "problem": problems}

    def _with_separator(self, ids: list[int]) -> list[int]:
        if not ids or self.separator_id is None:
            return ids
        return [self.separator_id, *ids] if self.separator_first else [*ids, self.separator_id]

    def _conversations(self, values: list[Any]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"ids": [], "targets": [], "problem": []}
        backend = self._backend(special=True)
        for value in values:
            ids: list[int] = []
            targets: list[bool] = []
            problem = ""
            try:
                if value is not None:
                    ids, targets = self._conversation(backend, value)
            except UnrenderableError as error:
                problem = str(error)
            for name, found in zip(columns, (ids, targets, problem), strict=True):
                columns[name].append(found)
        return columns

    def _conversation(self, backend: Any, value: Any) -> tuple[list[int], list[bool]]:
        rendered = render(self._tokenizer, clean(value), with_spans=self.assistant_only)
        encoding = backend.encode(rendered.text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        targets = [not self.assistant_only or any(a <= s < b for a, b in rendered.spans) for s in starts]
        targets[:1] = [False]  # nothing precedes the first token
        return encoding.ids, targets


@contextmanager
def _same_environment() -> Iterator[None]:
    """os.environ stays what it is: `datasets` leaves a copy in its place once it has worked in several processes."""
    environment, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - the very object that others hold, not a change of its content
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def encode(data: Any, source: Source, encoder: Encoder, work: Path, workers: int) -> Any:
    """`data` with every record encoded, cached in `work`; the result does not depend on `workers`.

    Raises PreflightError naming the first record that cannot be used.
    """
    from datasets import Features, List, Value

    processes = max(1, min(workers, len(data) // RECORDS_PER_WORKER))
    encoder.parallel = processes > 1
    key = Value("binary")
    features = {"ids": List(Value("uint32")), "targets": List(Value("bool")), "text_key": key, "group_key": key}
    work.mkdir(parents=True, exist_ok=True)
    with _same_environment():
        encoded = data.map(
            encoder,
            batched=True,
            batch_size=BATCH,
            num_proc=processes if processes > 1 else None,
            remove_columns=data.column_names,
            features=Features({**features, "success": Value("float32"), "problem": Value("string")}),
            cache_file_name=str(work / "encoded.arrow"),
            new_fingerprint=key_of([source.model_dump(), len(data)]).hex(),
        )
    for index, problem in enumerate(encoded["problem"]):
        if problem:
            raise PreflightError(
                f"{source.source}, record {index + 1}: field '{source.field}' {problem}",
                fix="correct or remove the record, or set `limit:` before it",
            )
    return encoded.remove_columns("problem")
