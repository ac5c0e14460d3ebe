"""Caches of growing length: bytes a token, read speed and the reader's peak memory, each read by a fresh process.

    python -m teacher_cache.growth FOLDER    (in benchmarks/: reads one cache, prints JSON)

Axes: R rows of T tokens.
The captured rows come again and again, by the product's writer and shards. Repetition flatters no layout: a shard is
coded by itself, and holds no row twice where enough was captured to fill one (65,536 tokens).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import CorpusReader
from lmdistill.evaluation.speed_worker import peak_rss_bytes
from lmdistill.signals.exchange.rows import Cache
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.writer import ShardWriter
from teacher_cache.reading import READ_ROWS, forgetful, quartiles, speed
from teacher_cache.said import write_cache

LEAST_TOKENS, LEAST_PASSES, MOST_PASSES = 2**20, 3, 51  # to time


def coded_rows(cache: Cache) -> NDArray[Any]:
    """All coded rows of the training split."""
    shards = cache.manifest.splits["train"].shards
    return np.concatenate([chunk.raw_R for shard in shards for chunk in cache.chunks(shard)])


def grown(source: Path, folder: Path, tokens: int, corpus: CorpusReader) -> dict[str, Any]:
    """Write `tokens` tokens of the cache in `source` to `folder` and have them read in training order."""
    cache = Cache(source)
    raw_R, length = coded_rows(cache), cache.layout.row_tokens

    def append(writer: ShardWriter, rows: slice) -> None:
        writer.append_coded(raw_R[np.arange(rows.start, rows.stop) % len(raw_R)])

    manifest = write_cache(folder, tokens // length, append, cache.layout, corpus, cache.manifest.teacher)
    found = read_elsewhere(folder)
    return {
        "tokens": tokens // length * length,
        "bytes_per_token": round(float(manifest.splits["train"].statistics["bytes_per_token"] or 0), 3),
        **found,
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def read_elsewhere(folder: Path) -> dict[str, Any]:
    """What a fresh process finds."""
    benchmarks = Path(__file__).parents[1]
    path = os.pathsep.join([str(benchmarks.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "teacher_cache.growth", str(folder)]
    done = subprocess.run(
        command, cwd=benchmarks, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def read(folder: Path) -> dict[str, Any]:
    """One pass as training reads, bytes proven and blocks kept, for the peak of memory; then passes that are timed."""
    started_with = peak_rss_bytes()
    reader = SignalsReader(folder)
    order_R = np.random.default_rng(0).permutation(reader.rows)
    for start in range(0, reader.rows, READ_ROWS):
        reader.read(order_R[start : start + READ_ROWS])
    peak, speeds = peak_rss_bytes(), list[float]()
    passes = LEAST_TOKENS // (len(order_R) * reader.row_tokens)
    for _ in range(min(max(passes, LEAST_PASSES), MOST_PASSES)):
        again = forgetful(folder)
        again.read([shard.first_row for shard in again.manifest.splits["train"].shards])
        speeds.append(speed(again, order_R))
    return {
        "read_tps": round(statistics.median(speeds)),
        "read_tps_quartiles": quartiles(speeds),
        "peak_rss_bytes": peak,
        "rss_before_bytes": started_with,
    }


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
