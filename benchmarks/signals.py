"""The teacher cache in figures: bytes, KL and read speed of each variant and of two peers' layouts, capture, growth.

    python benchmarks/signals.py [--json] [--tokens 204800] [--k 32] [--precision bfloat16] [--vllm-python PATH]

The embedded teacher reads real text (OpenWebText and Wikipedia passages) once; from what it said, exact, every layout
is written, read back and compared, so that all hold the same predictions. The result is also written to
benchmarks/results/signals.json. About a quarter of an hour on two idle cores, most of it the teacher's.

- `bytes_per_token`: of shards; `measured` has them with their records and the manifest too. Ours hold tokens, flags,
  the tail and `lp_next`; the peers' layouts hold ids and log-probs alone.
- `kl_mean`, `kl_p99` (nats a token): of the exact K entries and the rest from what is read back, as a cache's own
  statistics have it. For `sampled` the entries are the ids drawn: it is what storing loses. That a draw is not the
  distribution is no loss but noise, which averages out (sampled.py); `measured` has one draw's own KL.
- `read_tps`: tokens a second of one core, decoded to arrays, in batches of 32 rows: ours in random order and with the
  alignment proof, no decoded block used twice; the peers' in order.
- `capture`: the engine's scoring to a written cache as a share of its bare forward with head, tokens a second, in
  turns on --round-tokens tokens (shares.py); median of --rounds. null: not installed. vLLM wants --vllm-python.
  `measured` has the share of processor time too, which other work on the machine moves less.
- `growth`: [rows, bytes a token, read_tps, peak resident bytes of the process that reads it in training order], where
  a row is one position's entry; variant mmap, and compact in `measured`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import hardware
from numpy.typing import NDArray
from teacher_cache import growth, shares
from teacher_cache.peers import PEERS, ParquetLists, Peer, rest
from teacher_cache.reading import READ_ROWS, quartiles, random_passes
from teacher_cache.said import Said, code_figures, listen, write_cache
from teacher_cache.text import ARTICLES, PASSAGES, ROW_TOKENS, TEACHER, build_corpus

from lmdistill import assets
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import ModelRef, Runtime, SilentProgress
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.sampling import Sampling
from lmdistill.teachers.engine import EngineOptions, TopK
from lmdistill.teachers.registry import create_engine

RESULT = Path(__file__).parent / "results" / "signals.json"
PASSES = 15  # of reading
ENGINES = ("transformers", "llama_cpp")  # those that run in this process
FIGURES = ("bytes_per_token", "kl_mean", "kl_p99", "read_tps")
SIZES = (20_480, 65_536, 204_800, 655_360, 2_048_000)
GOALS = (  # section, layout, figure, at most (else at least)
    ("mmap", "bytes_per_token", 104, True),
    ("compact", "bytes_per_token", 64, True),
    ("mmap", "kl_p99", 1e-4, True),
    ("compact", "kl_p99", 1e-4, True),
    ("mmap", "read_tps", 5e6, False),
    ("compact", "read_tps", 5e5, False),
    ("capture", "transformers", 0.95, False),
    ("capture", "llama_cpp", 0.95, False),
    ("capture", "vllm", 0.95, False),
)
Read = Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Bench:
    """What every measurement works on."""

    args: argparse.Namespace
    scratch: Path
    teacher: ModelRef
    corpus: CorpusReader
    said: Said
    info: TeacherInfo

    def layout(self, variant: str) -> Layout:
        """Of one of our variants."""
        sampling = Sampling(self.args.draws) if variant == "sampled" else None
        k = self.args.draws if sampling else self.args.k
        return Layout(ROW_TOKENS, k, self.corpus.meta.vocab_size, variant, sampling=sampling)


def prepare(args: argparse.Namespace, scratch: Path) -> Bench:
    """Let the teacher speak, once."""
    teacher = assets.model_folder(TEACHER, SilentProgress())
    corpus = build_corpus(scratch / "corpus", teacher, args.tokens, (PASSAGES, ARTICLES))
    engine: Any = create_engine("transformers")
    device = Runtime().resolve_device()
    engine.open(teacher, EngineOptions(args.k, corpus.meta.vocab_size, args.precision, device))
    said = listen(engine, corpus, args.k, Sampling(args.draws))
    if said.tokens_RT.size != args.tokens // ROW_TOKENS * ROW_TOKENS:
        raise SystemExit(f"the text has {said.tokens_RT.size} tokens, not {args.tokens}")
    info = TeacherInfo(teacher.source, teacher.digest, args.precision, "transformers", engine.version())
    return Bench(args, scratch, teacher, corpus, said, info)


def measure_variant(bench: Bench, variant: str) -> dict[str, Any]:
    """Write, prove, read back and time one of our variants."""
    folder, said, layout = bench.scratch / variant, bench.said, bench.layout(variant)
    exact = said.drawn if layout.sampling else said.top
    started = time.process_time()
    manifest = write_cache(folder, len(said.tokens_RT), said.append(exact), layout, bench.corpus, bench.info)
    written = time.process_time() - started
    if problems := verify(folder):
        raise SystemExit("\n".join(problems))
    speeds = random_passes(folder, "train", PASSES)
    tokens, size = said.tokens_RT.size, sum(path.stat().st_size for path in folder.iterdir())
    return {
        "bytes_per_token": round(float(manifest.splits["train"].statistics["bytes_per_token"] or 0), 3),
        "bytes_per_token_with_records": round(size / tokens, 3),
        **code_figures(said, exact, _read_cache(folder, exact)),
        "read_tps": round(statistics.median(speeds)),
        "read_tps_quartiles": quartiles(speeds),
        "write_tps": round(tokens / written),
        **(one_draw(said) if layout.sampling else {}),
    }


def _read_cache(folder: Path, exact: TopK) -> Read:
    reader = SignalsReader(folder)
    for start in range(0, reader.rows, READ_ROWS):
        rows = slice(start, min(start + READ_ROWS, reader.rows))
        batch = reader.read(rows)
        assert (batch.ids_RTK == exact.ids_BTK[rows]).all()
        yield rows, batch.logp_RTK, batch.tail_RT


def one_draw(said: Said) -> dict[str, float]:
    """KL of one draw's weights from the teacher, and the mean number of distinct ids of a token."""
    counts_RTK, logp_RTK = said.drawn.counts_BTK, said.drawn.logp_BTK.astype(np.float64)
    weights = counts_RTK / counts_RTK.sum(axis=-1, keepdims=True, dtype=np.int64)
    kl = np.zeros(weights.shape)
    there = counts_RTK > 0
    kl[there] = weights[there] * (np.log(weights[there]) - logp_RTK[there])
    return {"one_draw_kl_mean": float(kl.sum(axis=-1).mean()), "distinct_ids": float(there.sum(axis=-1).mean())}


def measure_peer(bench: Bench, kind: type[Peer]) -> dict[str, Any]:
    """The same of a peer's layout."""
    exact, peer = bench.said.top, kind(bench.scratch / kind.name, ROW_TOKENS, bench.args.k)
    peer.write(exact.ids_BTK, exact.logp_BTK)
    speeds = [peer.speed(peer.batches()) for _ in range(PASSES)]
    found = {
        "bytes_per_token": round(peer.path.stat().st_size / bench.said.tokens_RT.size, 3),
        **code_figures(bench.said, exact, _read_peer(peer, exact)),
        "read_tps": round(statistics.median(speeds)),
        "read_tps_quartiles": quartiles(speeds),
    }
    if isinstance(peer, ParquetLists):
        found["read_tps_by_lists"] = round(peer.speed(peer.batches_by_lists()))
    return found


def _read_peer(peer: Peer, exact: TopK) -> Read:
    start = 0
    for ids_RTK, logp_RTK in peer.batches():
        rows = slice(start, start + len(ids_RTK))
        assert (ids_RTK == exact.ids_BTK[rows]).all()
        yield rows, logp_RTK, rest(logp_RTK)
        start = rows.stop


def measure_capture(bench: Bench) -> dict[str, dict[str, Any] | None]:
    """Each engine's share; vLLM's in the interpreter that is named."""
    args, folder = bench.args, bench.scratch / "round"
    corpus = build_corpus(folder, bench.teacher, args.round_tokens).folder

    def job(engine: str) -> shares.Job:
        return shares.Job(engine, bench.teacher, corpus, args.k, args.precision, args.rounds)

    return {
        **{name: shares.measure(job(name)) if name in args.engines else None for name in ENGINES},
        "vllm": shares.measure_elsewhere(job("vllm"), args.vllm_python) if args.vllm_python else None,
    }


def measure_growth(bench: Bench, variant: str) -> list[dict[str, Any]]:
    """The variant's cache at every length; one is on disk at a time."""
    found = []
    for tokens in bench.args.growth:
        folder = bench.scratch / "grown"
        found.append(growth.grown(bench.scratch / variant, folder, tokens, bench.corpus))
        shutil.rmtree(folder)
    return found


def result_of(found: dict[str, Any]) -> dict[str, Any]:
    """The figures asked for, and under `measured` everything."""
    layouts = {name: {key: found[name][key] for key in FIGURES} for name in ("mmap", "compact", "sampled")}
    result = {
        **layouts,
        "peers": {name: {key: peer[key] for key in FIGURES} for name, peer in found["peers"].items()},
        "capture": {name: measured and measured["share"] for name, measured in found["capture"].items()},
        "growth": [
            [size["tokens"], size["bytes_per_token"], size["read_tps"], size["peak_rss_bytes"]]
            for size in found["growth"]["mmap"]
        ],
    }
    return {**result, "measured": {**found, "missed": list(missed(result))}}


def missed(result: dict[str, Any]) -> Iterator[str]:
    """The goals that are not met, in words; what is null is not judged."""
    for section, name, bound, most in GOALS:
        value = result[section][name]
        if value is not None and (value > bound if most else value < bound):
            yield f"{section} {name}: {value}, wanted at {'most' if most else 'least'} {bound:g}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    load, clock = hardware(), Clock()
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare(args, Path(scratch))
        clock.note("teacher")
        found: dict[str, Any] = {name: measure_variant(bench, name) for name in ("mmap", "compact", "sampled")}
        found["peers"] = {kind.name: measure_peer(bench, kind) for kind in PEERS}
        clock.note("layouts")
        found["growth"] = {name: measure_growth(bench, name) for name in ("mmap", "compact")}
        clock.note("growth")
        found["capture"] = measure_capture(bench)
        clock.note("capture")
        tokens = bench.said.tokens_RT.size
    found |= {
        "setting": {"tokens": tokens, "row_tokens": ROW_TOKENS, **{key: getattr(args, key) for key in KEPT}},
        "seconds": clock.seconds,
        "hardware": load,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/signals.py", *sys.argv[1:]]),
    }
    return result_of(found)


class Clock:
    """Seconds of each part of the run, also told while it goes on."""

    def __init__(self) -> None:
        self.seconds: dict[str, int] = {}
        self._last = time.monotonic()

    def note(self, part: str) -> None:
        """A part has ended."""
        self.seconds[part], self._last = round(time.monotonic() - self._last), time.monotonic()
        print(f"{part}: {self.seconds[part]} s", file=sys.stderr)


KEPT = ("k", "precision", "draws", "rounds", "round_tokens")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=204_800, help="tokens of text to capture")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--draws", type=int, default=24, help="of a token, for `sampled`")
    parser.add_argument("--growth", type=int, nargs="+", default=SIZES, help="tokens of the growing caches")
    parser.add_argument("--rounds", type=int, default=5, help="of capture against bare forward")
    parser.add_argument("--round-tokens", type=int, default=8_192, help="tokens of a round")
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES, help="whose capture is timed")
    parser.add_argument("--vllm-python", type=Path, help="interpreter with vLLM, such as .venv-vllm/bin/python")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is kept")
    return parser.parse_args()


def main() -> None:
    """Measure, keep the result, print it."""
    args = parse()
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
