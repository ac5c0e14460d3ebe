"""Data files as `datasets.Dataset`s: format by ending, fields checked, bad lines named.

Nothing is written outside the given work folder.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from lmdistill.corpus.config import Source
from lmdistill.errors import PreflightError, nearest

ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text", ".text": "text"}
BUILDERS = {"jsonl": "json", "parquet": "parquet", "text": "text"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def format_of(source: Source, path: Path) -> str:
    """The format of `path`: what the recipe says, else by its ending; PreflightError where neither tells."""
    if source.format != "auto":
        return source.format
    if path.is_dir():
        return "hub"
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    found = ENDINGS.get(suffixes[-1]) if suffixes else None
    if found is None:
        raise PreflightError(
            f"{source.source}: the format is not known from the name {path.name}",
            fix="set `format:` to text, jsonl or parquet",
        )
    return found


def first_fields(source: Source, path: Path) -> list[str] | None:
    """The fields of the first record, read without loading the file; None for hub folders and JSON lists.

    Raises PreflightError where the file is empty, or its first record or its schema cannot be read.
    """
    kind = format_of(source, path)
    if kind == "text":
        return ["text"]
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        if kind == "jsonl" and path.suffix in ("", ".gz", *ENDINGS):
            opener: Any = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as lines:
                first = next((line for line in lines if line.strip()), "")
            if not first:
                raise _empty(source)
            return None if first.lstrip().startswith("[") else list(_record(first))  # a list of records is loaded
    except (ValueError, OSError, EOFError) as error:  # of JSON, UTF-8, gzip and Arrow
        raise unreadable(source, path, error) from error
    return None


def _empty(source: Source) -> PreflightError:
    return PreflightError(f"{source.source} has no records", why="it is empty", fix="check the file, or remove it")


def check_fields(source: Source, fields: list[str]) -> None:
    """Raise PreflightError naming the nearest field unless all fields that the recipe names are there."""
    text = "messages" if source.messages else "text"
    for role, wanted in ((text, source.field), ("group", source.group), ("success", source.success)):
        if wanted is not None and wanted not in fields:
            raise PreflightError(
                f"{source.source} has no field '{wanted}'{nearest(wanted, fields)}",
                why=f"its fields are {', '.join(map(repr, fields)) or 'none'}",
                fix=f"set `{role}:` to one of them",
            )


def load(source: Source, path: Path, work: Path) -> Any:
    """The records of `path` as a Dataset with the named fields only; its cache lies below `work`.

    Raises PreflightError naming file and line for a malformed record, and for missing fields or splits.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    kind = format_of(source, path)
    options: dict[str, Any] = {"cache_dir": str(work / "datasets")}
    try:
        if kind == "hub":
            data = datasets.load_dataset(str(path), source.subset, split=source.split, **options)
        else:
            if kind == "text":
                options["sample_by"] = source.unit
            data = datasets.load_dataset(BUILDERS[kind], data_files=str(path), split="train", **options)
    except StopIteration as error:  # what `datasets` says of a file without any record
        raise _empty(source) from error
    except (DatasetGenerationError, ValueError, OSError, TypeError) as error:
        raise unreadable(source, path, error) from error
    check_fields(source, list(data.column_names))
    data = data.select_columns([name for name in dict.fromkeys((source.field, source.group, source.success)) if name])
    return data if source.limit is None else data.select(range(min(source.limit, len(data))))


def unreadable(source: Source, path: Path, error: Exception) -> PreflightError:
    """The message for a source that fails to load or decode, with the line where one is malformed."""
    kind = format_of(source, path)
    cause = error.__cause__ or error
    if kind == "jsonl" and path.suffix in ENDINGS and (bad := _bad_line(path)) is not None:
        number, reason = bad
        return PreflightError(
            f"{path}, line {number}: not a JSON record",
            why=reason,
            fix="correct or remove that line; every line is one JSON object",
        )
    return PreflightError(
        f"{source.source} cannot be read as {kind}",
        why=str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__,
        fix="check `format:`, `split:` and `subset:`, and the file itself",
    )


def _bad_line(path: Path) -> tuple[int, str] | None:
    """Number and fault of the first line that is no JSON object."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, f"not UTF-8: {error.reason} at byte {error.start}"
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                return number, f"{error.msg} at column {error.colno}"
            if not isinstance(record, dict):
                return number, f"a {type(record).__name__}, not an object"
    return None


def _record(line: str) -> dict[str, Any]:
    """The record on `line`; ValueError where it is none."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"the first record is a {type(record).__name__}, not an object")
    return record
