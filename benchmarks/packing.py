"""The compact variant in figures, on a teacher cache that is there: bytes by part, KL, read speed against mmap's.

    python benchmarks/packing.py runs/lfm_small/02-teach-… [--split train] [--passes 5]

The cache's coded rows are packed anew into a scratch folder, read back and compared array by array. Then each is read
by one core in batches of 32 rows: in order; at random with all decoded blocks in the reader's memory (a cache that fits
there); and at random with room for one block only (a cache far larger). Seconds are the process' own, shards are not
hashed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from teacher_cache.reading import forgetful, speed

from lmdistill.signals import variant as variants
from lmdistill.signals.format import (
    MANIFEST_FILE,
    ShardEntry,
    bytes_per_token,
    canonical_json,
    load_manifest,
    record_name,
    sha256_of,
)
from lmdistill.signals.packing.segment import encode
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.variants.compact import Geometry


def coded_rows(reader: SignalsReader, shard: ShardEntry) -> NDArray[Any]:
    """The coded rows of one shard."""
    layout = reader.manifest.layout
    variant = variants.get(layout.variant)
    dtype = variant.dtype(layout)
    stored = variant.open(reader.folder / shard.file, layout, shard.rows, variants.Memory())
    raw = np.empty((shard.rows, dtype.itemsize), np.uint8)
    stored.copy_rows(range(shard.rows), [*raw])
    return raw.view(dtype)[:, 0]


def pack(reader: SignalsReader, folder: Path, name: str) -> tuple[SignalsReader, float]:
    """The split as a cache of the variant `name` in `folder`; seconds that packing took."""
    layout, entries, seconds = replace(reader.manifest.layout, variant=name), [], 0.0
    for shard in reader.manifest.splits[reader.split].shards:
        packer, raw_R = variants.get(name).packer(layout), coded_rows(reader, shard)
        started = time.process_time()
        blocks = [*packer.add(raw_R), *packer.finish()]
        seconds += time.process_time() - started
        data = b"".join(blocks)
        (folder / shard.file).write_bytes(data)
        record = canonical_json({"crc32": [zlib.crc32(block) for block in blocks], **packer.index()}).encode()
        (folder / record_name(shard.file)).write_bytes(record)
        entries.append(replace(shard, bytes=len(data), sha256=sha256_of(data), record_sha256=sha256_of(record)))
    split = replace(reader.manifest.splits[reader.split], shards=tuple(entries))
    manifest = replace(reader.manifest, layout=layout, splits={reader.split: split})
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    assert load_manifest(folder) == manifest
    return SignalsReader(folder, reader.split), seconds


def same(ours: NDArray[Any] | None, theirs: NDArray[Any] | None) -> bool:
    """Whether two arrays have the same bits."""
    return ours is theirs if ours is None or theirs is None else ours.tobytes() == theirs.tobytes()


def read_speeds(folder: Path, split: str, passes: int) -> dict[str, int]:
    """Medians of each way of reading; what is decoded is forgotten before each pass."""
    found: dict[str, list[float]] = {"in_order": [], "random_in_memory": [], "random_one_block": []}
    for number in range(passes):
        reader = SignalsReader(folder, split, verify=False)
        order = np.random.default_rng(number).permutation(reader.rows)
        found["in_order"].append(speed(reader, np.arange(reader.rows)))
        found["random_in_memory"].append(speed(reader, order))
        found["random_one_block"].append(speed(forgetful(folder, split), order))
    return {name: round(statistics.median(speeds)) for name, speeds in found.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    source = SignalsReader(args.cache, args.split)
    result: dict[str, Any] = {"tokens": source.rows * source.row_tokens, "k": source.k}
    for name in ("mmap", "compact"):
        with tempfile.TemporaryDirectory() as scratch:
            reader, seconds = pack(source, Path(scratch), name)
            ours, theirs = reader.read(slice(None)), source.read(slice(None))
            assert all(same(array, vars(theirs)[key]) for key, array in vars(ours).items()), "not lossless"
            shards = reader.manifest.splits[args.split].shards
            stored = sum(path.stat().st_size for path in Path(scratch).iterdir())
            result[name] = {
                "bytes_per_token": bytes_per_token(reader.manifest.layout, shards),
                "bytes_per_token_with_records": round(stored / result["tokens"], 2),
                "kl_p99": reader.statistics["kl_p99"],
                "pack_tps": round(result["tokens"] / seconds),
                "read_tps": read_speeds(Path(scratch), args.split, args.passes),
            }
    layout, shard = source.manifest.layout, source.manifest.splits[args.split].shards[0]
    raw_R = coded_rows(source, shard)
    sizes = encode(layout, raw_R, Geometry(layout, raw_R.dtype).block_rows).sizes()
    result["compact"]["parts"] = {name: round(size / raw_R["token"].size, 2) for name, size in sizes.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="a finished teach stage, or its out/")
    parser.add_argument("--split", default="train")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="on one line, not indented")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments), indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
