"""A corpus from its sources: load, encode, deduplicate, split, shuffle, pack, and the metadata that proves it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmdistill.checkpoints import copy_tokenizer, load_tokenizer
from lmdistill.corpus import tokenizers
from lmdistill.corpus.config import CorpusConfig
from lmdistill.corpus.documents import (
    Documents,
    Indices,
    first_of_each_text,
    gather,
    shuffled,
    split_by_group,
    with_targets,
)
from lmdistill.corpus.encode import Encoder, encode
from lmdistill.corpus.format import META_FILE, TEST, TOKENIZER_FOLDER, TRAIN, VALID, CorpusMeta, SplitMeta, success_file
from lmdistill.corpus.load import load, unreadable
from lmdistill.corpus.pack import Rows, pack
from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import Progress

ARRAYS = ("tokens", "flags", "bytes")


def build(
    config: CorpusConfig,
    paths: Sequence[Path],
    tokenizer_folder: Path,
    out: Path,
    work: Path,
    progress: Progress,
    workers: int | None = None,
) -> dict[str, Any]:
    """Build the corpus of `config.sources`, which lie at `paths`, into `out`; returns the stage's metrics.

    Deterministic whatever `workers` is. Encoded sources are kept in `work`, so that a second run after a kill does
    not tokenise again what was done. Raises PreflightError for records that cannot be used, or where nothing is left.
    """
    for leftover in out.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    documents = gather(_encoded(config, paths, tokenizer_folder, work, progress, workers), work)
    usable = with_targets(documents)
    chosen = first_of_each_text(documents, usable) if config.deduplicate == "exact" else usable
    if len(chosen) == 0:
        raise PreflightError(
            "the corpus is empty",
            why=f"none of {len(documents)} records has text to learn from",
            fix="check `text:` or `messages:` and the sources",
        )
    meta = _pack_splits(config, documents, chosen, tokenizer_folder, out, work)
    copy_tokenizer(tokenizer_folder, out / TOKENIZER_FOLDER)
    (out / META_FILE).write_text(meta.to_json())
    return {
        "records": len(documents),
        "empty": len(documents) - len(usable),
        "duplicates": len(usable) - len(chosen),
        "documents": len(chosen),
        "splits": {name: asdict(split) for name, split in meta.splits.items()},
        "tokens": sum(split.tokens for split in meta.splits.values()),
        "bytes_per_token": _bytes_per_token(meta.splits),
    }


def _encoded(
    config: CorpusConfig,
    paths: Sequence[Path],
    tokenizer_folder: Path,
    work: Path,
    progress: Progress,
    workers: int | None,
) -> list[Any]:
    """Every source, loaded and encoded, each in a work folder of its own."""
    tokenizer = load_tokenizer(tokenizer_folder)
    separator = tokenizers.separator_id(tokenizer, config.separator)
    done = []
    for number, (source, path) in enumerate(zip(config.sources, paths, strict=True)):
        progress.update(number, len(paths), "sources")
        folder = work / f"source-{number:03d}"
        data = load(source, path, folder)
        encoder = Encoder(
            tokenizer_folder=str(tokenizer_folder),
            field_name=source.field,
            is_chat=source.messages is not None,
            group=source.group,
            assistant_only=config.assistant_only,
            separator_id=separator,
            separator_first=config.separator == "bos",
            parallel=False,
            success=source.success,
        )
        try:
            done.append(encode(data, source, encoder, folder, workers or os.cpu_count() or 1))
        except UnicodeDecodeError as error:  # columnar readers leave it to the first use of a text
            raise unreadable(source, path, error) from error
        progress.note(f"{source.source}: {len(data)} records encoded")
    progress.update(len(paths), len(paths), "sources")
    return done


def _pack_splits(
    config: CorpusConfig, documents: Documents, chosen: Indices, tokenizer_folder: Path, out: Path, work: Path
) -> CorpusMeta:
    """Split, shuffle and pack; each split's files are moved into `out` when they are whole."""
    bytes_V = tokenizers.token_bytes(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    padding = tokenizers.pad_id(tokenizer)
    splits: dict[str, SplitMeta] = {}
    for name, members in split_by_group(documents, chosen, config.valid_fraction, config.test_fraction).items():
        if name == VALID and config.valid_fraction == 0:
            continue
        order = shuffled(documents, members, config.shuffle_seed)
        rows = Rows(config.sequence_length, config.packing == "single", config.row_cap(name), padding, len(bytes_V))
        split = pack(documents, order, rows, bytes_V, work / name)
        if split is None:
            raise _empty_split(name, len(members), len(chosen), config)
        splits[name] = split
        for kind in ARRAYS:
            (work / f"{name}.{kind}.npy").replace(out / f"{name}.{kind}.npy")
        if success_file(work, name).exists():
            success_file(work, name).replace(success_file(out, name))
    return CorpusMeta(
        sequence_length=config.sequence_length,
        packing=config.packing,
        vocab_size=len(bytes_V),
        tokenizer_digest=tokenizers.tokenizer_digest(tokenizer_folder),
        chat_template_digest=tokenizers.chat_template_digest(tokenizer_folder),
        separator_id=tokenizers.separator_id(tokenizer, config.separator),
        pad_id=padding,
        splits=splits,
    )


def _empty_split(name: str, members: int, documents: int, config: CorpusConfig) -> PreflightError:
    key = "test_fraction" if name == TEST else "valid_fraction"
    return PreflightError(
        f"the corpus has nothing for the split '{name}'",
        why=f"of {documents} documents {members} fall into it at {key} {getattr(config, key)}",
        fix=f"{'lower' if name == TRAIN else 'raise'} `{key}`, or add data",
    )


def _bytes_per_token(splits: dict[str, SplitMeta]) -> float:
    targets = sum(split.targets for split in splits.values())
    return round(sum(split.target_bytes for split in splits.values()) / targets, 6)


def model_maximum(folder: Path) -> int | None:
    """The longest sequence in tokens that the model in `folder` was made for; None where it does not say."""
    config = folder / "config.json"
    if not config.exists():
        return None
    found = json.loads(config.read_text()).get("max_position_embeddings")
    return found if isinstance(found, int) else None
