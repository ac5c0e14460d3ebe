"""How well a device's speed is foretold: the latency model against shapes that it was not fitted to.

    python benchmarks/search_latency.py [--json] [--fit 32] [--held-out 32] [--rounds 8] [--bursts 4] [--prompts 512]

Random-weight students of the embedded teacher's search space (6 to 30 layers, five widths, five MLP widths, one to
three key heads, any share of attention) are timed as q4_0 files in llama.cpp beside a reference: `fit` of them, unlike
each other, make the model; `held_out` of them, drawn at random, are foretold. Both come in turns in one run, groups of
four, so that no drift of the machine comes between them. `--profile` keeps the timings, and a killed run goes on there.
The result is also written to benchmarks/results/search_latency.json. About twelve minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from machine import hardware
from scipy.stats import spearmanr

from lmdistill.search import design, device
from lmdistill.search.candidate import Candidate
from lmdistill.search.latency import Interval, LatencyModel
from lmdistill.search.profile import DECODE, Measured, Profile, Request, TimingPlan, prefill_task
from lmdistill.search.space import Space, SpaceConfig
from lmdistill.search.sub_space import SubSpace, whole

RESULT = Path(__file__).parent / "results" / "search_latency.json"
TEACHER = {  # SmolLM2-135M's widths
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
SPACE = SpaceConfig(
    depth=(6, 30),
    hidden_sizes=(320, 384, 448, 512, 576),
    intermediate_sizes=(512, 768, 1024, 1280, 1536),
    kv_heads=(1, 2, 3),
    kernels=(3, 4),
)
HELD_OUT_SEED = 1


def held_out_shapes(sub: SubSpace, count: int, known: Sequence[Candidate]) -> list[Candidate]:
    """Random shapes of the space that the fit does not see."""
    rng = random.Random(HELD_OUT_SEED)
    seen, found = {candidate.shape_digest for candidate in known}, []
    while len(found) < count:
        candidate = sub.sample(rng)
        if candidate.shape_digest not in seen:
            seen.add(candidate.shape_digest)
            found.append(candidate)
    return found


def timed(arguments: argparse.Namespace, result: Path) -> tuple[Profile, list[Candidate]]:
    """The profile of shapes to fit and shapes to foretell, in random order, and the latter."""
    sub = whole(Space(SPACE, TEACHER, arguments.format))
    fit = design.spread_out(sub, arguments.fit, seed=0)
    held_out = held_out_shapes(sub, arguments.held_out, fit)
    mixed = [*fit, *held_out]
    random.Random(0).shuffle(mixed)
    reference = sorted(fit, key=lambda candidate: candidate.parameters)[len(fit) // 2]
    plan = TimingPlan(
        arguments.format,
        tuple(arguments.prompts),
        arguments.decode,
        arguments.rounds,
        threads=arguments.threads,
        bursts=arguments.bursts,
    )

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} timed", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="search-latency-") as work:
        return device.run(Request(plan, reference, tuple(mixed)), result, Path(work), report), held_out


def errors(
    rows: Sequence[Measured], foretold: Callable[[Candidate], Interval], measured: Callable[[Measured], float]
) -> dict[str, Any]:
    """Predicted against measured, over held-out shapes."""
    predicted = [foretold(row.candidate) for row in rows]
    actual = np.array([measured(row) for row in rows])
    relative = np.abs(np.array([each.value for each in predicted]) / actual - 1)
    inside = [each.low <= value <= each.high for each, value in zip(predicted, actual, strict=True)]
    return {
        "held_out": len(rows),
        "spearman": round(float(spearmanr([each.value for each in predicted], actual).statistic), 4),
        "median_rel_error": round(float(np.median(relative)), 4),
        "p90_rel_error": round(float(np.quantile(relative, 0.9)), 4),
        "within_90_interval": round(float(np.mean(inside)), 3),
        "fastest_to_slowest": round(float(actual.max() / actual.min()), 2),
    }


def noise(profile: Profile, rows: Sequence[Measured], task: str) -> float:
    """Median over shapes of the standard error that a shape's median ratio to the reference has over the rounds."""
    spreads = []
    for row in rows:
        ratios = np.array(row.ratios(task))
        low, high = np.quantile(ratios, [0.25, 0.75])
        spreads.append((high - low) / 1.349 * 1.253 / np.sqrt(len(ratios)) / np.median(ratios))
    return round(float(np.median(spreads)), 4)


def figures(profile: Profile, held_out: Sequence[Candidate]) -> dict[str, Any]:
    """The model of the shapes to fit, tried on the others."""
    digests = {candidate.shape_digest for candidate in held_out}
    rows = [row for digest, row in profile.measured.items() if digest in digests]
    known = Profile(profile.plan, profile.reference, profile.device)
    known.add(row for digest, row in profile.measured.items() if digest not in digests)
    model, plan = LatencyModel.fit(known), profile.plan
    found: dict[str, Any] = {
        "decode": errors(
            rows,
            lambda each: model.predict(each).decode_tps,
            lambda row: plan.decode / profile.seconds(row, DECODE),
        )
        | {"timing_noise": noise(profile, rows, DECODE)}
    }
    for tokens in plan.prompts:
        task = prefill_task(tokens)
        found[task] = errors(
            rows,
            lambda each, tokens=tokens: model.predict(each).ttft_ms[tokens],
            lambda row, task=task: profile.seconds(row, task) * 1e3,
        ) | {"timing_noise": noise(profile, rows, task)}
    found["rss_bytes"] = errors(rows, lambda each: model.predict(each).rss_bytes, lambda row: row.peak_rss_bytes)
    found["file_bytes"] = errors(rows, lambda each: model.predict(each).file_bytes, lambda row: row.file_bytes)
    return {
        "held_out": len(rows),
        "spearman": found["decode"]["spearman"],
        "median_rel_error": found["decode"]["median_rel_error"],
        **found,
        "model": model.to_json(),
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--fit", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512])
    parser.add_argument("--decode", type=int, default=32, help="tokens of a burst of generation")
    parser.add_argument("--bursts", type=int, default=4, help="of generation in a round")
    parser.add_argument("--format", default="q4_0")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", type=Path, help="keep the timings here, and go on with them")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    """Time, fit, foretell, write."""
    arguments, begun = parsed(), hardware()
    with tempfile.TemporaryDirectory(prefix="search-latency-") as folder:
        profile, held_out = timed(arguments, arguments.profile or Path(folder) / "profile.json")
    result = figures(profile, held_out)
    result["measured"] = {
        "command": "python benchmarks/search_latency.py " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": begun,
        "device": profile.device,
        "plan": asdict(profile.plan),
        "fit": len(profile.measured) - len(held_out),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))
    else:
        for name in ("decode", *map(prefill_task, profile.plan.prompts), "rss_bytes", "file_bytes"):
            print(f"{name}: {result[name]}")


if __name__ == "__main__":
    main()
