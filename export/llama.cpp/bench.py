"""How fast GGUF files are on this machine: python bench.py A.gguf B.gguf [--prefill 512] [--decode 128].

The files take turns, so that a machine that slows down slows all of them; median and spread of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime, default_threads
from lmdistill.deployment.runner import run


def spread(rates: list[float]) -> str:
    """Median and range of tokens a second."""
    return f"{statistics.median(rates):8.1f} ({min(rates):.1f}–{max(rates):.1f})"


def main() -> None:
    """Print one line a file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("gguf", type=Path, nargs="+", help="model files")
    arguments.add_argument("--prefill", type=int, default=512, help="tokens of the prompt read at once")
    arguments.add_argument("--decode", type=int, default=128, help="tokens read one at a time")
    arguments.add_argument("--rounds", type=int, default=5, help="repetitions, after one warm-up")
    arguments.add_argument("--threads", type=int, default=default_threads(), help="CPU threads")
    given = arguments.parse_args()
    prefill: dict[Path, list[float]] = {path: [] for path in given.gguf}
    decode: dict[Path, list[float]] = {path: [] for path in given.gguf}
    for turn in range(given.rounds + 1):
        for path in prefill:
            n_ctx = max(given.prefill, given.decode)
            with LlamaCppRuntime(path, n_ctx=n_ctx, n_threads=given.threads) as runtime:
                read = given.prefill / runtime.prefill_seconds(given.prefill)
                decoded = given.decode / runtime.decode_seconds(given.decode)
            if turn:
                prefill[path].append(read)
                decode[path].append(decoded)
    print(f"{given.threads} threads, {given.rounds} rounds; tokens a second: median (range)")
    for path in prefill:
        size = path.stat().st_size / 1e6
        print(f"{path.name}  {size:.1f} MB  prefill {spread(prefill[path])}  decode {spread(decode[path])}")


if __name__ == "__main__":
    run(main)
