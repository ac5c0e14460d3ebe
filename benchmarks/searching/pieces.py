"""The pieces, each a function of the bench that returns its figures as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmdistill.checkpoints import save_model
from lmdistill.pipeline.stage import Runtime
from lmdistill.recipe import load_recipe
from lmdistill.search import run
from lmdistill.search.candidate import Candidate
from lmdistill.search.front import hypervolume
from lmdistill.search.sandwich import TRAINED
from lmdistill.search.scored import RANKED, Scored
from searching.bench import Bench

ENDS = 2  # the largest and the smallest candidate of a sandwich step


def search(bench: Bench) -> dict[str, Any]:
    """The stage itself."""
    ctx = bench.budgeted()
    metrics = run.search(ctx)
    found = bench.found()
    names = ("budgets", "teacher", "sub_spaces", "finalists", "winner")
    hand = bench.hand_made()
    costs = run.begin(ctx).costs
    return {
        **metrics,
        **{name: found[name] for name in names},
        "front": len(found["front"]),
        "candidate": json.loads((ctx.out / "student.json").read_text())["candidate"],
        "hand_made": {"candidate": hand.to_json(), "predicted": dict(costs.figures(hand))},
    }


def random_search(bench: Bench) -> dict[str, Any]:
    """Random candidates trained on as many tokens as the super-network's, and the hypervolume of both."""
    ctx = bench.budgeted()
    config, world = ctx.config, run.begin(ctx)
    budget = config.supernet.tokens * (ENDS + config.supernet.random_candidates)
    each = max(1, budget // bench.args.random)
    rng = random.Random(config.seed)
    candidates = [world.subs[0].sample(rng) for _ in range(bench.args.random)]
    drawn = []
    for place, candidate in enumerate(candidates):
        name = f"random-{place}"

        def make(candidate: Candidate = candidate, name: str = name) -> dict[str, Any]:
            start = _extracted(bench, world, candidate, world.initial, name)
            return bench.trained(name, start, config.distilling(each), world.reader, world.heldout)

        drawn.append([bench.kept(name, make)[RANKED], world.costs.figures(candidate)["decode_ms"]])
    ours = [[one["loss"][RANKED], one["predicted"]["decode_ms"]] for one in bench.found()["candidates"]]
    reference = np.array([*ours, *drawn]).max(0)
    volumes = {
        name: hypervolume(np.array(points), reference) for name, points in (("searched", ours), ("random", drawn))
    }
    return {
        "ratio": round(volumes["searched"] / volumes["random"], 4),
        "hypervolume": volumes,
        "reference": reference.tolist(),
        "tokens": {"all": budget, "each": each},
        "random": drawn,
    }


def short(bench: Bench) -> dict[str, Any]:
    """Inherited losses against those after a short distillation, of candidates from the best to the worst."""
    from scipy.stats import spearmanr

    ctx = bench.budgeted()
    config, world = ctx.config, run.begin(ctx)
    state = ctx.work / f"sub-{world.subs[0].name}" / "training" / TRAINED
    tried = {one["digest"]: one for one in bench.found()["candidates"]}
    ordered = sorted(tried.values(), key=lambda one: (one["loss"][RANKED], one["digest"]))
    places = np.linspace(0, len(ordered) - 1, bench.args.short).round().astype(int)
    pairs = []
    for one in (ordered[place] for place in dict.fromkeys(places.tolist())):
        name = f"short-{one['digest'][:16]}"

        def make(one: dict[str, Any] = one, name: str = name) -> dict[str, Any]:
            start = _extracted(bench, world, Candidate.from_json(one["candidate"]), state, name)
            return bench.trained(name, start, config.distilling(bench.args.short_tokens), world.reader, world.heldout)

        pairs.append([one["loss"][RANKED], bench.kept(name, make)[RANKED]])
    inherited, after = zip(*pairs, strict=True)
    return {
        "spearman": round(float(spearmanr(inherited, after).statistic), 4),
        "tokens": bench.args.short_tokens,
        "inherited_and_after": pairs,
    }


def _extracted(bench: Bench, world: run.World, candidate: Candidate, state: Path, name: str) -> Path:
    folder = Path(bench.args.store) / "scratch" / f"{name}-start"
    model = world.extract(Scored(candidate, {}, {}, {}), state)
    save_model(model.float().cpu(), folder, tokenizer_from=world.tokenizer)
    return folder


def equal(bench: Bench) -> dict[str, Any]:
    """Both students after equal distillation: the keys of lfm_search, the same rows, held-out text."""
    from lmdistill.evaluation.heldout import read_heldout
    from lmdistill.pipeline.stage import ModelRef
    from lmdistill.recommend.trial import score_model, train_and_score

    args, device = bench.args, Runtime().resolve_device()
    keys = next(entry.config for entry in load_recipe("lfm_search").entries if entry.name == "distill")
    config = keys.model_copy(update={"tokens": args.tokens, "compile": args.compile, "checkpoint_steps": 10})
    heldout = read_heldout(bench.corpus.out, "valid", args.heldout)
    starts = {"searched": bench.folder / "out" / "model", "hand_made": bench.student.model().path}
    found: dict[str, Any] = {}
    for who, folder in starts.items():

        def make(who: str = who, folder: Path = folder) -> dict[str, Any]:
            start = ModelRef(who, folder, who)
            scratch = Path(args.store) / "scratch" / who
            scored = train_and_score(config, start, bench.signals.out, heldout, scratch, device)  # type: ignore[arg-type]
            return {"nll": round(scored.nll, 5), "tokens": scored.tokens}

        def before(folder: Path = folder) -> dict[str, Any]:
            rows, _ = score_model(folder, heldout, device)
            return {"start_nll": round(sum(rows.sums["nll"]) / sum(rows.predictions), 5)}

        found[who] = bench.kept(f"start-{who}", before) | bench.kept(f"equal-{who}", make)
    return found


def timed(bench: Bench) -> dict[str, Any]:
    """Both shapes on this machine, in turns."""
    from lmdistill.search import device
    from lmdistill.search.profile import DECODE, Request, TimingPlan, prefill_task

    hand = bench.hand_made()
    searched = Candidate.from_json(json.loads((bench.folder / "out" / "student.json").read_text())["candidate"])
    plan = TimingPlan(bench.config.timing.format, rounds=4 * bench.config.timing.rounds)
    asked = Request(plan, hand, tuple({one.shape_digest: one for one in (searched, hand)}.values()))
    profile = device.run(asked, Path(bench.args.store) / "timed.json", bench.folder / "timed")
    found = {}
    for who, candidate in (("searched", searched), ("hand_made", hand)):
        measured = profile.measured[candidate.shape_digest]
        found[who] = {
            "decode_tps": round(plan.decode / profile.seconds(measured, DECODE), 2),
            "ttft_ms": round(1e3 * profile.seconds(measured, prefill_task(min(plan.prompts))), 2),
            "rss_bytes": measured.peak_rss_bytes,
        }
    return found


MAKERS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "search": search,
    "random": random_search,
    "short": short,
    "equal": equal,
    "device": timed,
}
