"""How fast files are on this machine: python bench.py A.pte B.gguf [--prefill 512] [--decode 128].

Programs and GGUF files side by side, each in a process of its own, in turns; median and range of the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from lmdistill.deployment.llama_cpp_runtime import default_threads
from lmdistill.deployment.runner import run
from lmdistill.deployment.targets import targets
from lmdistill.errors import LmdistillError
from lmdistill.evaluation.speed import SpeedPlan, SpeedTarget, measure


def spread(rates: dict[str, Any]) -> str:
    """Median and range of tokens a second."""
    return f"{rates['median']:8.1f} ({rates['min']:.1f}–{rates['max']:.1f})"


def speed_target(path: Path) -> SpeedTarget:
    """A file with the runtime that its name says; raises LmdistillError where there is none."""
    runtimes = {target.suffix: target.runtime for target in targets().values()}
    if not path.is_file():
        raise LmdistillError(f"no such file: {path}")
    if path.suffix not in runtimes:
        raise LmdistillError(f"nothing here runs {path.name}", why=f"known are {', '.join(sorted(runtimes))}")
    return SpeedTarget(str(path), runtimes[path.suffix], path)


def main() -> None:
    """Print one line a file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("files", type=Path, nargs="+", help=".pte and .gguf files")
    arguments.add_argument("--prefill", type=int, default=512, help="tokens of the prompt read at once")
    arguments.add_argument("--decode", type=int, default=128, help="tokens read one at a time")
    arguments.add_argument("--rounds", type=int, default=5, help="repetitions, after one warm-up")
    arguments.add_argument("--threads", type=int, default=default_threads(), help="CPU threads")
    given = arguments.parse_args()
    plan = SpeedPlan(given.prefill, given.decode, given.rounds, given.threads)
    timed = [speed_target(path) for path in dict.fromkeys(given.files)]
    with tempfile.TemporaryDirectory() as logs:
        rows = measure(timed, plan, Path(logs))
    print(f"{given.threads} threads, {given.rounds} rounds; tokens a second: median (range)")
    for one in timed:
        row, size = rows[one.name], one.path.stat().st_size / 1e6
        speeds = f"prefill {spread(row['prefill_tps'])}  decode {spread(row['decode_tps'])}"
        print(f"{one.path.name}  {size:.1f} MB  {speeds}  peak {row['peak_rss_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    run(main)
