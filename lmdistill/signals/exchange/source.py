"""Records of another program's data: Parquet, Arrow as `datasets` saves it, JSON lines or one JSON list; streamed.

A record knows its place, so that whatever is wrong with it is told by file, row and field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import AssetError, PreflightError

KINDS = (".parquet", ".arrow", ".jsonl", ".json")  # the first that a folder holds is read
BATCH_ROWS = 16


@dataclass(frozen=True)
class Ragged:
    """A list of lists of numbers: all numbers, and how many are in each list."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    def dense(self, width: int, fill: float) -> NDArray[Any]:
        """`[rows, width]`, what a row lacks filled with `fill`."""
        out = np.full((len(self.lengths), width), fill, self.values.dtype)
        out[np.arange(width) < self.lengths[:, None]] = self.values
        return out


class Record:
    """One record; `fields` holds pyarrow scalars or what JSON says."""

    def __init__(self, file: Path, row: int, fields: dict[str, Any]) -> None:
        self.file, self.row = file, row
        self._fields = {name: value for name, value in fields.items() if not _is_null(value)}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    @property
    def names(self) -> list[str]:
        """The fields that are not null."""
        return list(self._fields)

    def fail(self, field: str, what: str, expected: str) -> NoReturn:
        """Raise PreflightError for a malformed field."""
        raise PreflightError(
            f"{self.file}, row {self.row}: field '{field}' {what}", why=f"expected {expected}", fix="correct the data"
        )

    def rows(self, name: str) -> int:
        """How many lists a field holds."""
        value = self._fields[name]
        inner = value.values if hasattr(value, "values") else value
        if not hasattr(inner, "__len__") or isinstance(inner, str | dict):
            self.fail(name, "is not a list", "a list for each token")
        return len(inner)

    def plain(self, name: str) -> Any:
        """The field as JSON would have it."""
        value = self._fields[name]
        return value.as_py() if hasattr(value, "as_py") else value

    def vector(self, name: str, expected: str = "a list of whole numbers") -> NDArray[np.int64]:
        """A list of whole numbers."""
        value = self._fields[name]
        if hasattr(value, "values"):
            found = value.values.to_numpy(zero_copy_only=False)
        else:
            found = np.asarray(value if isinstance(value, list) else None)
        if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
            self.fail(name, "is not a list of whole numbers", expected)
        numbers: NDArray[np.int64] = found.astype(np.int64)
        return numbers

    def ragged(self, name: str, expected: str) -> Ragged:
        """A list of lists of numbers; null counts as an empty list."""
        value = self._fields[name]
        try:
            return _arrow_ragged(value.values) if hasattr(value, "values") else _json_ragged(value)
        except (TypeError, ValueError, AttributeError):
            self.fail(name, "is not a list of lists of numbers", expected)


def _is_null(value: Any) -> bool:
    return value is None or (hasattr(value, "as_py") and not value.is_valid)


def _arrow_ragged(rows: Any) -> Ragged:
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = rows.flatten().to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iuf" and len(values):
        raise TypeError(values.dtype)
    return Ragged(values, lengths)


def _json_ragged(rows: Any) -> Ragged:
    if not isinstance(rows, list) or any(row is not None and not isinstance(row, list) for row in rows):
        raise TypeError("no list of lists")
    flat = [value for row in rows for value in row or ()]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in flat):
        raise TypeError("no numbers")
    whole = all(isinstance(value, int) for value in flat)
    return Ragged(np.array(flat, np.int64 if whole else np.float64), np.array([len(row or ()) for row in rows]))


def data_files(source: Path) -> list[Path]:
    """The files of `source` in reading order; raises AssetError where there are none."""
    if source.is_file() and source.suffix in KINDS:
        return [source]
    for kind in KINDS if source.is_dir() else ():
        found = [path for path in source.rglob(f"*{kind}") if not path.name.startswith(".")]
        if found:
            return sorted(found, key=lambda path: _by_number(str(path.relative_to(source))))
    what = f"no data in {source}" if source.exists() else f"there is no {source}"
    raise AssetError(what, why=f"files that end in {', '.join(KINDS)} are read", fix="give the file, or its folder")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts data_10 after data_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def field_names(files: Sequence[Path]) -> list[str]:
    """The fields of the first record; raises PreflightError where there is none."""
    for record in read(files):
        return record.names
    raise PreflightError(f"{files[0]} holds no record", fix="give another file")


def read(files: Sequence[Path], only: Sequence[str] | None = None) -> Iterator[Record]:
    """Every record in order, with the named fields or all; rows count from 0 in each file."""
    for file in files:
        for row, fields in enumerate(_records(file, only)):
            yield Record(file, row, fields)


def _records(file: Path, only: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    if file.suffix in (".parquet", ".arrow"):
        yield from _arrow_records(file, only)
    elif file.suffix == ".jsonl" or not _is_list(file):
        yield from _json_lines(file)
    else:
        yield from _json_list(file)


def _arrow_records(file: Path, only: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            parquet = pq.ParquetFile(file)
            names = [name for name in parquet.schema_arrow.names if only is None or name in only]
            batches: Any = parquet.iter_batches(batch_size=BATCH_ROWS, columns=names)
        else:
            batches = pa.ipc.open_stream(pa.memory_map(str(file)))
        for batch in batches:
            names = [name for name in batch.schema.names if only is None or name in only]
            columns = [batch.column(name) for name in names]
            for row in range(batch.num_rows):
                yield {name: column[row] for name, column in zip(names, columns, strict=True)}
    except pa.ArrowException as error:
        raise PreflightError(
            f"{file} cannot be read as {file.suffix[1:]}",
            why=str(error).splitlines()[0],
            fix="check the file: it is cut or damaged",
        ) from error


def _is_list(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(64).lstrip()[:1] == b"["


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(file, f"line {number}", line)


def _json_list(file: Path) -> Iterator[dict[str, Any]]:
    try:
        records = json.loads(file.read_bytes())
    except ValueError as error:
        raise _no_json(file, "its list", str(error)) from error
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise _no_json(file, f"row {number}", f"a {type(record).__name__}, not an object")
        yield record


def _object(file: Path, place: str, text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _no_json(file, place, str(error)) from error
    if not isinstance(record, dict):
        raise _no_json(file, place, f"a {type(record).__name__}, not an object")
    return record


def _no_json(file: Path, place: str, why: str) -> PreflightError:
    return PreflightError(f"{file}, {place}: not a JSON record", why=why, fix="correct or remove it")
