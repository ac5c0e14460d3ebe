"""What a teacher cache holds, and whether its bytes are those that were written: `lmdistill cache info|verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.signals import variant as variants
from lmdistill.signals.format import ShardEntry, bytes_per_token, find_folder, load_manifest
from lmdistill.signals.hidden_files import hidden_problems
from lmdistill.signals.integrity import shard_problems
from lmdistill.signals.reader import SignalsReader


def describe(folder: Path) -> dict[str, Any]:
    """The facts of the cache in `folder` (an artefact or its out/), ready to print or dump as JSON."""
    folder = find_folder(folder)
    manifest = load_manifest(folder)
    layout = manifest.layout
    splits = {
        name: {
            "rows": split.rows,
            "tokens": split.rows * layout.row_tokens,
            "shards": len(split.shards),
            "bytes": sum(shard.bytes for shard in split.shards),
            "statistics": split.statistics,
        }
        for name, split in manifest.splits.items()
    }
    return {
        "folder": str(folder),
        "digest": manifest.digest,
        "variant": layout.variant,
        "access": variants.get(layout.variant).access,
        "k": layout.k,
        "vocab_size": layout.vocab_size,
        "row_tokens": layout.row_tokens,
        "bytes_per_token": bytes_per_token(
            layout, [shard for split in manifest.splits.values() for shard in split.shards]
        ),
        "hidden": None if layout.hidden is None else asdict(layout.hidden) | {"bytes_per_token": layout.beside},
        "packing": manifest.packing,
        "teacher": manifest.teacher.fields,
        "tokenizer_digest": manifest.tokenizer_digest,
        "chat_template_digest": manifest.chat_template_digest,
        **({"imported": [asdict(source) for source in manifest.imported]} if manifest.imported else {}),
        "splits": splits,
    }


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Every problem found in the cache: missing, cut, flipped (shard, block, byte range) or misaligned rows.

    `progress` is told shards done and shards in all. Raises IntegrityError where the manifest itself is unusable.
    """
    folder = find_folder(folder)
    manifest = load_manifest(folder)
    problems: list[str] = []
    total = sum(len(split.shards) for split in manifest.splits.values())
    done = 0
    for name, split in manifest.splits.items():
        for shard in split.shards:
            found = shard_problems(folder, shard, manifest.layout)
            problems += found + hidden_problems(folder, shard, manifest.layout)
            if not found:
                problems += _misalignment(SignalsReader(folder, name, verify=False), shard)
            done += 1
            if progress is not None:
                progress(done, total)
    return problems


def _misalignment(reader: SignalsReader, shard: ShardEntry) -> list[str]:
    for start in range(shard.first_row, shard.first_row + shard.rows, 64):
        try:
            reader.read(range(start, min(start + 64, shard.first_row + shard.rows)))
        except IntegrityError as error:
            return [error.render()]
    return []
