"""Ways to spoil an artefact so that only one particular check can notice."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmdistill.pipeline.files import sha256_file
from lmdistill.signals import variant as variants
from lmdistill.signals.format import Manifest, canonical_json, load_manifest


def flip_byte(file: Path, place: int) -> None:
    """Flip one bit of one byte."""
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def swap_tokens(model: Path, target: Path, one: int, other: int) -> Path:
    """A copy of a model folder in whose tokenizer two ids have changed places."""
    target.mkdir()
    for file in model.iterdir():
        if file.name != "tokenizer.json":
            (target / file.name).symlink_to(file)
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    names = {number: token for token, number in vocabulary.items()}
    vocabulary[names[one]], vocabulary[names[other]] = other, one
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def of_another_tokenizer(teach: Path) -> None:
    """Put a cache in place whose tokens come from another tokenizer; it is whole in itself."""
    manifest = load_manifest(teach / "out")
    _write(teach, replace(manifest, tokenizer_digest=hashlib.sha256(b"another").hexdigest()))


def shift_tokens(teach: Path) -> None:
    """Shift every row's tokens by one against their log-probs, and make every digest right again."""
    manifest, out = load_manifest(teach / "out"), teach / "out"
    layout, splits = manifest.layout, {}
    variant = variants.get(layout.variant)
    for name, split in manifest.splits.items():
        shards = []
        for shard in split.shards:
            rows = np.fromfile(out / shard.file, variant.dtype(layout))
            rows["token"] = np.roll(rows["token"], 1, axis=1)
            rows.tofile(out / shard.file)
            record_file = (out / shard.file).with_suffix(".json")
            packer = variant.packer(layout)
            blocks = [*packer.add(rows), *packer.finish()]
            record = json.loads(record_file.read_text())
            record |= {"sha256": sha256_file(out / shard.file), "crc32": [zlib.crc32(block) for block in blocks]}
            record_file.write_text(canonical_json(record))
            shards.append(replace(shard, sha256=record["sha256"], record_sha256=sha256_file(record_file)))
        splits[name] = replace(split, shards=tuple(shards))
    _write(teach, replace(manifest, splits=splits))


def _write(teach: Path, manifest: Manifest) -> None:
    """signals.json, and the artefact's own manifest to go with all files as they are now."""
    (teach / "out" / "signals.json").write_text(manifest.to_json())
    listing = json.loads((teach / "manifest.json").read_text())
    for name, entry in listing["files"].items():
        entry["sha256"] = sha256_file(teach / "out" / name)
        entry["bytes"] = (teach / "out" / name).stat().st_size
    (teach / "manifest.json").write_text(json.dumps(listing))
