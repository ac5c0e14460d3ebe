"""Every objective at equal tokens: held-out loss and calibration of students that start alike, three seeds each.

    python benchmarks/quality.py [--json] [--tokens 16384] [--heldout 6144] [--seeds 3] [--minutes 30] [--ways ce …]

benchmarks/quality.yaml makes the text, the teacher's caches and the one start (runs/quality, kept). Then each way of
WAYS trains that start on the same rows in the same order (a seed is an order of rows) and is scored on held-out text in
float32: mean negative log-likelihood in nats a token, and expected calibration error. Distilling ways learn half from
the text, as recipes do (--kd-weight, λ = 0.5): cross-entropy knows the text, and is to be beaten by what the teacher
adds to it. Those that end in _only learn from the teacher alone (λ = 1).
Each result is kept as it comes: stopped (or after --minutes), the same command goes on. Figures of all that is there go
to benchmarks/results/quality.json, table and plot to benchmarks/README.md. About forty minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import hardware
from quality_page import README, RESULT, write_page

from lmdistill.evaluation.heldout import HeldOut, read_heldout
from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, SilentProgress
from lmdistill.recommend.trial import score_model, train_and_score
from lmdistill.training.config import DistillConfig

RECIPE = Path(__file__).with_suffix(".yaml")
TOP_K = "teach"  # the stage with the top-K cache; live teacher and cross-entropy read their rows there too


Seeds = dict[int, dict[str, Any]]  # seed → result


@dataclass(frozen=True)
class Way:
    """An objective: the stage whose cache it learns from, and its keys of `distill`."""

    cache: str
    keys: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "ce": Way(TOP_K, {"loss": "ce"}),
    "full_kl": Way(TOP_K, {"loss": "full_kl"}),
    "topk_renorm": Way(TOP_K, {"loss": "topk_renormalised"}),
    "rest_bucket": Way(TOP_K, {"loss": "topk_rest_bucket"}),
    "decoupled": Way(TOP_K, {"loss": "decoupled_topk"}),
    "decoupled_tau2": Way(TOP_K, {"loss": "decoupled_topk", "temperature": 2.0}),
    "decoupled_tau4": Way(TOP_K, {"loss": "decoupled_topk", "temperature": 4.0}),
    "sampled_12": Way("sampled_12", {"loss": "sampled_kd"}),
    "sampled_32": Way("sampled_32", {"loss": "sampled_kd"}),
    "bd_kd": Way(TOP_K, {"loss": "bd_kd"}),
    "full_kl_only": Way(TOP_K, {"loss": "full_kl", "kd_weight": 1.0}),
    "decoupled_only": Way(TOP_K, {"loss": "decoupled_topk", "kd_weight": 1.0}),
}


@dataclass(frozen=True)
class World:
    """What all ways share."""

    made: dict[str, Artefact]  # of quality.yaml, by stage
    teacher: ModelRef
    heldout: HeldOut
    store: Path


def prepare(recipe: Path, run_dir: Path, heldout_tokens: int) -> World:
    """Text, caches and start from the recipe, made or kept."""
    from rich.console import Console

    from lmdistill import assets
    from lmdistill.pipeline.display import make_display
    from lmdistill.pipeline.plan import make_plan
    from lmdistill.pipeline.run import run_pipeline
    from lmdistill.recipe import load_recipe

    loaded = load_recipe(recipe)
    assert loaded.teacher is not None
    made = run_pipeline(make_plan(loaded, run_dir), [make_display(Console(stderr=True))])
    teacher = assets.model_folder(loaded.teacher, SilentProgress())
    return World(made, teacher, read_heldout(made["corpus"].out, "valid", heldout_tokens), run_dir / "ways")


def config_of(way: Way, seed: int, args: argparse.Namespace) -> DistillConfig:
    """A way's keys, with those that all ways have alike."""
    shared = {"tokens": args.tokens, "batch_rows": args.batch_rows, "lr": args.lr, "checkpoint_steps": 1_000_000}
    weight = {} if way.keys["loss"] == "ce" else {"kd_weight": args.kd_weight}
    return DistillConfig(**{**shared, "seed": seed, **weight, **way.keys})


def key_of(way: Way, config: DistillConfig, world: World) -> dict[str, Any]:
    """What a kept result must have been made with to count."""
    from lmdistill.pipeline.keys import semantic, tool_versions
    from lmdistill.stages.distill import DistillStage

    inputs = {name: world.made[name].fingerprint for name in ("corpus", "student", way.cache)}
    return {
        "settings": semantic(config, str),
        "inputs": inputs,
        "heldout": world.heldout.predictions,
        "distill": DistillStage.version,
        "tools": tool_versions(DistillStage.tools),
    }


def kept(name: str, seed: int, key: dict[str, Any], world: World) -> dict[str, Any] | None:
    """The result of an earlier run with the same key."""
    path = world.store / f"{name}-{seed}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("key") == key else None


def run_way(name: str, way: Way, seed: int, world: World, args: argparse.Namespace) -> dict[str, Any]:
    """Train, score, keep the result, drop the model."""
    config = config_of(way, seed, args)
    student, device = world.made["student"].model(), Runtime().resolve_device()
    teacher = world.teacher if config.live else None
    started = time.perf_counter()
    cache, scratch = world.made[way.cache].out, world.store / "work"
    scored = train_and_score(config, student, cache, world.heldout, scratch, device, teacher)
    result = {
        "key": key_of(way, config, world),
        "tokens": scored.tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "ece": scored.calibration_error,
        "rows": scored.rows.to_json(),
    }
    write_json(world.store / f"{name}-{seed}.json", result)
    return result


def nll(result: dict[str, Any]) -> float:
    """Mean negative log-likelihood of one result, nats a token."""
    rows = result["rows"]
    return math.fsum(rows["sums"]["nll"]) / sum(rows["predictions"])


def gap(results: Seeds, others: Seeds) -> list[float | None] | None:
    """How much more loss than the others, over the seeds that both have, and its standard error over held-out rows."""
    from lmdistill.evaluation.divergence import ratio_and_error

    pairs = [(results[seed]["rows"], others[seed]["rows"]) for seed in results if seed in others]
    if not pairs:
        return None
    predictions_R = pairs[0][0]["predictions"]
    sums_R = [
        math.fsum(one["sums"]["nll"][row] - other["sums"]["nll"][row] for one, other in pairs)
        for row in range(len(predictions_R))
    ]
    mean, error = ratio_and_error(sums_R, [count * len(pairs) for count in predictions_R])
    return [round(mean, 5), None if error is None else round(error, 5)]


def spread(results: dict[str, Seeds]) -> dict[str, Any]:
    """Each way over its seeds, and against full KL and cross-entropy on the same rows and seeds."""
    import statistics

    found: dict[str, Any] = {}
    for name, seeds in results.items():
        each = list(seeds.values())
        values = [nll(one) for one in each]
        found[name] = {
            "nll_mean": round(statistics.fmean(values), 5),
            "nll_sd": round(statistics.stdev(values), 5) if len(values) > 1 else None,
            "ece_mean": round(statistics.fmean(one["ece"] for one in each), 5),
            "seconds": [one["seconds"] for one in each],
            **{f"over_{rival}": gap(seeds, results[rival]) for rival in ("full_kl", "ce") if rival in results},
        }
    return found


def expected(figures: dict[str, Any]) -> dict[str, Any]:
    """What was expected of the figures: the decoupled loss within 1% of full KL, every distilled student below CE."""
    said: dict[str, Any] = {}
    if {"decoupled", "full_kl"} <= figures.keys():
        ratio = figures["decoupled"]["nll_mean"] / figures["full_kl"]["nll_mean"]
        said |= {"decoupled_over_full_kl": round(ratio, 5), "within_1_percent": ratio <= 1.01}
    if "ce" in figures:
        said["not_below_ce"] = [
            name for name, one in figures.items() if name != "ce" and one["nll_mean"] >= figures["ce"]["nll_mean"]
        ]
    return said


def describe(world: World, results: dict[str, Seeds], args: argparse.Namespace) -> dict[str, Any]:
    """Setting and machine, spread and expectations."""
    figures = spread(results)
    sampled = {name: world.made[name].metrics for name in world.made if name.startswith("sampled")}
    return {
        "tokens": next((one["tokens"] for each in results.values() for one in each.values()), args.tokens),
        "seeds": args.seeds,
        "kd_weight": args.kd_weight,
        "batch_rows": args.batch_rows,
        "lr": args.lr,
        "heldout_predictions": world.heldout.predictions,
        "student": world.made["student"].metrics,
        "start_nll": start_nll(world),
        "teacher_nll": world.made[TOP_K].metrics["teacher_nll"],
        "head_mass": {name: made["head_mass"] for name, made in {TOP_K: world.made[TOP_K].metrics, **sampled}.items()},
        "distinct_ids": {name: distinct_ids(world.made[name].out) for name in sampled},
        "spread": figures,
        "expected": expected(figures),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/quality.py", *sys.argv[1:]]),
    }


def start_nll(world: World) -> float:
    """Held-out loss of the student that all start from; scored once."""
    path = world.store / f"start-{world.made['student'].fingerprint[:12]}-{world.heldout.predictions}.json"
    if not path.exists():
        rows, _ = score_model(world.made["student"].model().path, world.heldout, Runtime().resolve_device())
        write_json(path, {"rows": rows.to_json()})
    return round(nll(json.loads(path.read_text())), 5)


def distinct_ids(folder: Path) -> float:
    """Mean number of different ids that a sampled cache holds of a token."""
    import numpy as np

    from lmdistill.signals.reader import SignalsReader

    batch = SignalsReader(folder, "train").read(slice(0, 16))
    return round(float(np.isfinite(batch.logp_RTK).sum(-1).mean()), 2)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is not there yet, as long as there is time; all that is there as one object."""
    deadline = time.monotonic() + 60 * args.minutes
    world = prepare(args.recipe, args.run_dir, args.heldout)
    world.store.mkdir(parents=True, exist_ok=True)
    results: dict[str, Seeds] = {name: {} for name in args.ways}
    # Seed by seed: stopped early, every way has as many seeds as the others.
    for seed in range(args.seeds):
        for name in args.ways:
            way = WAYS[name]
            result = kept(name, seed, key_of(way, config_of(way, seed, args), world), world)
            if result is None and time.monotonic() < deadline:
                result = run_way(name, way, seed, world, args)
                print(f"{name}, seed {seed}: {nll(result):.4f} nats in {result['seconds']} s", file=sys.stderr)
            if result is not None:
                results[name][seed] = result
    results = {name: each for name, each in results.items() if each}
    if not results:
        raise SystemExit(f"nothing measured in {args.minutes:g} minutes; the same command goes on")
    raw = {
        name: {
            "nll": [round(nll(one), 5) for one in each.values()],
            "ece": [round(one["ece"], 5) for one in each.values()],
        }
        for name, each in results.items()
    }
    return {**raw, "measured": describe(world, results, args)}


def main() -> None:
    """Measure, keep the figures, write table and plot, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens that each way trains on")
    parser.add_argument("--heldout", type=int, default=6_144, help="held-out tokens to score")
    parser.add_argument("--seeds", type=int, default=3, help="orders of rows")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="objectives; default: all")
    parser.add_argument("--kd-weight", type=float, default=0.5, help="λ of the distilling ways")
    parser.add_argument("--batch-rows", type=int, default=2, help="rows of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak step, relative to each tensor's size")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no training after so many minutes")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quality"), help="where everything is kept")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what makes text, caches and start")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    parser.add_argument("--readme", type=Path, default=README, help="the page that gets table and plot")
    args = parser.parse_args()
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    write_page(result, args.readme, args.out.with_suffix(".svg"))
    print(json.dumps(result) if args.json else json.dumps(result["measured"]["spread"], indent=1))


if __name__ == "__main__":
    main()
