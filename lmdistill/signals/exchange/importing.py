"""Another program's captured log-probs as a cache: read twice, once to know how much there is, once to write it.

Axes: R rows, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmdistill.checkpoints import copy_tokenizer, load_tokenizer
from lmdistill.corpus.format import LOSS, TOKENIZER_FOLDER, TRAIN, VALID
from lmdistill.corpus.tokenizers import chat_template_digest, pad_id, tokenizer_digest
from lmdistill.errors import PreflightError, nearest
from lmdistill.pipeline.files import write_text
from lmdistill.pipeline.stage import Progress, SilentProgress
from lmdistill.signals.exchange.document import TAIL_FLOOR, Document, Reading
from lmdistill.signals.exchange.folder import made_whole
from lmdistill.signals.exchange.import_writing import Writing
from lmdistill.signals.exchange.offsets import Offsets
from lmdistill.signals.exchange.placing import PACKING, Shape, in_rows
from lmdistill.signals.exchange.rows import Cache, keeps_top_k, split_entry
from lmdistill.signals.exchange.source import data_files
from lmdistill.signals.exchange.tokenizer_check import check_tokenizer
from lmdistill.signals.format import MANIFEST_FILE, ImportInfo, Layout, Manifest, TeacherInfo
from lmdistill.signals.shard_work import Meter
from lmdistill.signals.writer import ShardRecord

FORMATS = {  # and the options that each alone reads
    "axolotl": ("alignment", "logprobs_field", "messages_field", "drop_unmatched"),
    "distillkit": ("config",),
}
VERSION = "1"  # of how data is understood


@dataclass(frozen=True)
class ImportOptions:
    """How the data is read, and what the cache is to be."""

    format: str
    tokenizer: Path  # folder
    teacher: str = ""  # who spoke; empty: the source's name
    config: Path | None = None  # DistillKit's settings of the capture
    k: int | None = None  # None: as many as the source has
    row_tokens: int | None = None  # None: the longest document
    variant: str = "mmap"
    valid_fraction: float = 0.0
    alignment: str = "next"
    temperature: float = 1.0
    renormalize: bool = False
    logprobs_field: str = "logprobs"
    messages_field: str = "messages"
    drop_unmatched: bool = False


@dataclass(frozen=True)
class Outline:
    """What the first reading finds."""

    documents: int
    without_target: int
    cut: int  # documents longer than a row
    rows: dict[str, int]  # by split


@dataclass(frozen=True)
class Imported:
    """What came of an import."""

    manifest: Manifest
    outline: Outline
    unmatched: list[str]  # records that were left out

    def notes(self) -> Iterator[str]:
        """What a user should know of it, a line each."""
        outline, splits = self.outline, self.manifest.splits.values()
        if outline.without_target:
            yield f"{outline.without_target} of {outline.documents} documents have no target with log-probs: left out"
        if outline.cut:
            yield f"{outline.cut} documents are longer than a row: cut"
        if self.unmatched:
            yield f"{len(self.unmatched)} conversations do not fit their log-probs: left out, {self.unmatched[0]} first"
        unknown = sum(source.next_unknown for source in self.manifest.imported)
        targets = sum(int(split.statistics["targets"] or 0) for split in splits)
        yield f"{unknown:,} of {targets:,} targets are not among the entries: nothing proves their alignment"
        mass = next(iter(splits)).statistics["head_mass"]
        if mass is not None and mass > 1 - 2 * TAIL_FLOOR and self.manifest.layout.k < self.manifest.layout.vocab_size:
            yield "the entries sum to 1: what the teacher gave to other tokens was lost before this import"


class SourceData(Protocol):
    """A data set in one of the formats."""

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary it was captured for; None where it does not say."""

    def documents(self) -> Iterator[Document]:
        """Every document in order."""

    def texts(self) -> Iterator[tuple[str, NDArray[np.int64], str]]:
        """Place, tokens and text of records that have their text."""

    def entries_per_position(self) -> tuple[int, int]:
        """The fewest and the most entries that a position has."""


def import_cache(source: Path, out: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """Write the log-probs in `source` to a cache `out`; goes on where a killed run stopped.

    Raises PreflightError naming file, row and field for data that cannot be used.
    """
    from lmdistill.assets import content_digest

    _check_options(options)
    files, padding = data_files(source), pad_id(load_tokenizer(options.tokenizer))
    data = _open(source, files, options)
    vocabulary = check_tokenizer(source, data, options.tokenizer)
    digest = content_digest(source)
    with made_whole(out, _job(options, digest)) as target:
        reading = _reading(data, options, vocabulary)
        outline, row_tokens = _outline(data, options)
        layout = _layout(reading, row_tokens, options.variant)
        meter = Meter(sum(outline.rows.values()) * row_tokens, progress or SilentProgress())
        teacher, offsets = _teacher(source, options), Offsets(options.alignment)
        work = Writing(target, layout, teacher, reading, offsets, padding, meter)
        shaped = ((Shape.of(document, options.valid_fraction), document) for document in data.documents())
        records = work.run(in_rows(shaped, row_tokens), outline.rows)
        offsets.judge()
        manifest = _manifest(target, work, records, options, digest)
        copy_tokenizer(options.tokenizer, target / TOKENIZER_FOLDER)
        write_text(target / MANIFEST_FILE, manifest.to_json())
    return Imported(manifest, outline, list(getattr(data, "unmatched", ())))


def _teacher(source: Path, options: ImportOptions) -> TeacherInfo:
    """Who spoke, as the user says: nothing in the data proves it."""
    name = options.teacher or source.name
    return TeacherInfo(name, f"unproven:{name}", "unknown", f"import:{options.format}", VERSION)


def _manifest(
    folder: Path, work: Writing, records: dict[str, list[ShardRecord]], options: ImportOptions, digest: str
) -> Manifest:
    """The manifest of what was written, with the corpus digests of the rows themselves."""
    manifest = Manifest(
        layout=work.layout,
        shard_rows=work.shard_rows,
        packing=PACKING,
        tokenizer_digest=tokenizer_digest(options.tokenizer),
        chat_template_digest=chat_template_digest(options.tokenizer),
        teacher=work.teacher,
        splits={name: split_entry(work.layout, "", found) for name, found in records.items()},
    )
    cache = Cache(folder, manifest)
    splits = {name: replace(split, corpus_digest=cache.corpus_digest(name)) for name, split in manifest.splits.items()}
    kept = ImportInfo(
        format=options.format,
        source=work.teacher.source,
        source_digest=digest,
        tail_floor=TAIL_FLOOR,
        alignment=options.alignment,
        temperature=options.temperature,
        renormalised=options.renormalize,
        next_unknown=sum(_unknown(cache, name) for name in splits),
    )
    return replace(manifest, splits=splits, imported=(kept,))


def _check_options(options: ImportOptions) -> None:
    if not keeps_top_k(options.variant):
        raise PreflightError(
            f"--variant {options.variant}: imported log-probs are the most likely, not draws", fix="mmap or compact"
        )
    for name, value, allowed in (
        ("format", options.format, (*FORMATS,)),
        ("alignment", options.alignment, ("next", "same")),
    ):
        if value not in allowed:
            raise PreflightError(f"--{name} {value}{nearest(value, allowed)}", fix=f"one of: {', '.join(allowed)}")
    plain = ImportOptions(options.format, options.tokenizer)
    for other in FORMATS.keys() - {options.format}:
        for name in FORMATS[other]:
            if getattr(options, name) != getattr(plain, name):
                raise PreflightError(
                    f"--{name.replace('_', '-')} goes with --format {other}", fix=f"leave it out for {options.format}"
                )
    if not (options.temperature > 0 and 0 <= options.valid_fraction < 1):
        raise PreflightError("--temperature is above 0, --valid-fraction from 0 to below 1", fix="correct them")


def _open(source: Path, files: list[Path], options: ImportOptions) -> SourceData:
    if options.format == "distillkit":
        from lmdistill.signals.exchange.distillkit import DistillKit

        tokenizer = load_tokenizer(options.tokenizer)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
        return DistillKit.open(source, files, options.config, padding)
    from lmdistill.signals.exchange.axolotl import Axolotl

    return Axolotl(
        files,
        options.tokenizer,
        options.alignment,
        options.logprobs_field,
        options.messages_field,
        options.drop_unmatched,
    )


def _job(options: ImportOptions, digest: str) -> dict[str, Any]:
    """What the cache is made from and how; no path is in it."""
    from lmdistill.assets import content_digest

    fields = {**asdict(options), "tokenizer": content_digest(options.tokenizer / "tokenizer.json")}
    fields["config"] = content_digest(options.config) if options.config else None
    return {"command": "import", "source": digest, **fields}


def _reading(data: SourceData, options: ImportOptions, vocabulary: int) -> Reading:
    fewest, most = data.entries_per_position()
    usual = fewest if fewest == most - 1 else most  # a server adds the written token where it is not among the K
    k = min(usual, vocabulary) if options.k is None else options.k
    if not 1 <= k <= min(most, vocabulary):
        raise PreflightError(
            f"{k} entries of a token are asked for, the data has {most}, the tokenizer {vocabulary} tokens",
            fix="give a --k between 1 and the fewer of them" if most else "check the file: no position has log-probs",
        )
    return Reading(vocabulary, k, options.temperature, options.renormalize, ragged=fewest < k)


def _outline(data: SourceData, options: ImportOptions) -> tuple[Outline, int]:
    """The first reading, and the tokens of a row."""
    shapes = [Shape.of(document, options.valid_fraction) for document in data.documents()]
    row_tokens = options.row_tokens or max((shape.length for shape in shapes), default=0)
    if row_tokens < 2:
        raise PreflightError("no document has two tokens", fix="check the file and --row-tokens")
    outline = Outline(
        documents=len(shapes),
        without_target=sum(shape.first_counted is None for shape in shapes),
        cut=sum(shape.length > row_tokens for shape in shapes),
        rows=dict(Counter(split for split, _ in in_rows(((shape, shape) for shape in shapes), row_tokens))),
    )
    for split in (TRAIN, *([VALID] if options.valid_fraction else [])):
        if not outline.rows.get(split):
            raise PreflightError(
                f"there is nothing for the split '{split}'",
                why=f"of {outline.documents} documents {outline.without_target} have no target with log-probs",
                fix="check `labels` and --valid-fraction" if outline.documents else "check the file",
            )
    return outline, row_tokens


def _layout(reading: Reading, row_tokens: int, variant: str) -> Layout:
    layout = Layout(row_tokens, reading.k, reading.vocab_size, variant, open_next=True)
    return replace(layout, top_p=1.0, k_min=1) if reading.ragged else layout


def _unknown(cache: Cache, split: str) -> int:
    """Targets whose log-prob the source did not tell."""
    return sum(
        int((((chunk.raw_R["flags"] & LOSS) != 0) & np.isnan(chunk.raw_R["lp_next"])).sum())
        for shard in cache.manifest.splits[split].shards
        for chunk in cache.chunks(shard)
    )
