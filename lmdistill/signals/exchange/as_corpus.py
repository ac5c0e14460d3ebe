"""A teacher cache as a run's own corpus and signals: its rows with the tokenizer they come from, and its files.

Axes: R rows, T tokens in a row.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lmdistill.asset_spec import AssetSpec
from lmdistill.checkpoints import copy_tokenizer, load_tokenizer
from lmdistill.corpus import tokenizers
from lmdistill.corpus.format import (
    DOC_START,
    LOSS,
    META_FILE,
    PAD,
    TOKENIZER_FOLDER,
    CorpusMeta,
    SplitMeta,
    token_dtype,
    tokens_digest,
)
from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.signals.exchange.folder import take
from lmdistill.signals.exchange.rows import Cache
from lmdistill.signals.format import MANIFEST_FILE, record_name
from lmdistill.signals.hidden_files import hidden_name


def open_cache(spec: AssetSpec) -> Cache:
    """The cache that a recipe names; PreflightError where it is no folder, IntegrityError where it is no cache."""
    from lmdistill.assets import available

    path = available(spec)
    if path is None or not path.is_dir():
        raise PreflightError(f"there is no teacher cache {spec.source}", fix="correct `cache`")
    return Cache(path)


def tokenizer_beside(cache: Cache) -> Path:
    """The tokenizer in the cache's folder; PreflightError where there is none."""
    folder = cache.folder / TOKENIZER_FOLDER
    if not (folder / "tokenizer.json").is_file():
        raise PreflightError(
            f"the cache {cache.folder} has no tokenizer beside it",
            why="a cache that was captured here holds its tokenizer's digest only",
            fix="name the tokenizer of its tokens in `tokenizer`",
        )
    return folder


def check_tokenizer(cache: Cache, folder: Path) -> None:
    """Raise PreflightError where the tokenizer or chat template in `folder` is not the one of the cache's tokens."""
    found = tokenizers.tokenizer_digest(folder), tokenizers.chat_template_digest(folder)
    wanted = cache.manifest.tokenizer_digest, cache.manifest.chat_template_digest
    for name, ours, theirs in zip(("tokenizer", "chat template"), found, wanted, strict=True):
        if ours != theirs:
            raise PreflightError(
                f"the {name} in {folder} is not the one of the cache {cache.folder}",
                why=f"digests {(ours or 'none')[:12]} and {(theirs or 'none')[:12]}",
                fix="name the tokenizer that the cache was made with in `tokenizer`",
            )


def corpus_from_cache(cache: Cache, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Write the rows of `cache` as a corpus into `out`; the stage's metrics.

    Raises IntegrityError where the rows are not those that the cache's manifest speaks of.
    """
    check_tokenizer(cache, tokenizer)
    splits = {name: _split(cache, name, tokenizer, out) for name in cache.manifest.splits}
    meta = CorpusMeta(
        sequence_length=cache.layout.row_tokens,
        packing=cache.manifest.packing,
        vocab_size=cache.layout.vocab_size,
        tokenizer_digest=cache.manifest.tokenizer_digest,
        chat_template_digest=cache.manifest.chat_template_digest,
        separator_id=None,
        pad_id=tokenizers.pad_id(load_tokenizer(tokenizer)),
        splits=splits,
    )
    copy_tokenizer(tokenizer, out / TOKENIZER_FOLDER)
    (out / META_FILE).write_text(meta.to_json())
    return {
        "documents": sum(split.documents for split in splits.values()),
        "tokens": sum(split.tokens for split in splits.values()),
        "splits": {name: asdict(split) for name, split in splits.items()},
    }


def _split(cache: Cache, name: str, tokenizer: Path, out: Path) -> SplitMeta:
    entry, bytes_V = cache.manifest.splits[name], tokenizers.token_bytes(tokenizer)
    shape, length = (entry.rows, cache.layout.row_tokens), 0
    tokens_RT = np.lib.format.open_memmap(
        out / f"{name}.tokens.npy", mode="w+", dtype=token_dtype(cache.layout.vocab_size), shape=shape
    )
    flags_RT = np.lib.format.open_memmap(out / f"{name}.flags.npy", mode="w+", dtype=np.uint8, shape=shape)
    bytes_R = np.empty(entry.rows, np.uint32)
    totals = np.zeros(3, np.int64)  # documents, tokens, targets
    for shard in entry.shards:
        cache.record(shard)  # its bytes are what was written
        for tokens, flags in cache.tokens([shard]):
            rows = slice(length, length + len(tokens))
            length, counted = rows.stop, (flags[:, :-1] & LOSS) != 0
            tokens_RT[rows], flags_RT[rows] = tokens, flags
            bytes_R[rows] = (bytes_V[tokens[:, 1:]] * counted).sum(axis=1)
            totals += ((flags & DOC_START) != 0).sum(), ((flags & PAD) == 0).sum(), counted.sum()
    np.save(out / f"{name}.bytes.npy", bytes_R, allow_pickle=False)
    digest = tokens_digest(tokens_RT, flags_RT)
    if digest != entry.corpus_digest:
        raise IntegrityError(
            f"the rows of split '{name}' in {cache.folder} are not those its manifest speaks of",
            why=f"digest {digest[:12]} where the manifest has {entry.corpus_digest[:12]}",
            fix="make that cache anew",
        )
    documents, tokens_in_all, targets = totals.tolist()
    return SplitMeta(entry.rows, documents, tokens_in_all, targets, int(bytes_R.sum(dtype=np.int64)), digest)


def take_cache(cache: Cache, out: Path) -> None:
    """Put a whole cache's files into `out`, the manifest last; raises IntegrityError for a damaged shard."""
    for split in cache.manifest.splits.values():
        for shard in split.shards:
            cache.record(shard)
            names = [shard.file, record_name(shard.file)]
            for name in [*names, *([hidden_name(shard.file)] if cache.layout.hidden else [])]:
                take(cache.folder / name, out / name)
    take(cache.folder / MANIFEST_FILE, out / MANIFEST_FILE)
