"""The pieces, each a function of the bench that returns its figures as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lmdistill.search import run
from lmdistill.search.candidate import Candidate
from lmdistill.search.costs import open_device
from lmdistill.search.front import hypervolume
from lmdistill.search.record import supernet_file
from lmdistill.search.scored import RANKED
from lmdistill.search.space import Space, shape_of
from searching.bench import Bench, extracted
from searching.students import equal, fresh, starts

ENDS = 2  # the largest and the smallest candidate of a sandwich step
MARGIN = 0.1  # by which a hypervolume's reference lies beyond the points: those on its edge count nothing


def search(bench: Bench) -> dict[str, Any]:
    """What the run searched and found, and what the latency model says of the student made by hand."""
    found, ctx = bench.found(), bench.context()
    names = ("budgets", "teacher", "sub_spaces", "finalists", "winner")
    hand, teacher = bench.hand_made(), json.loads((bench.teacher.path / "config.json").read_text())
    space = Space(ctx.config.space, teacher, ctx.config.timing.format)
    costs = open_device(ctx.config, space, ctx.out, ctx.work, ctx.progress)
    return {
        "tried": len(found["candidates"]),
        **{name: found[name] for name in names},
        "front": len(found["front"]),
        "candidate": bench.searched_shape().to_json(),
        "hand_made": {"candidate": hand.to_json(), "predicted": dict(costs.figures(hand))},
    }


Draw = Callable[[run.World, random.Random], Candidate]


def random_search(bench: Bench) -> dict[str, Any]:
    """Candidates drawn from all of the space."""
    return _against(bench, "random", lambda world, rng: world.subs[0].sample(rng))


def ranked_search(bench: Bench) -> dict[str, Any]:
    """Shapes drawn at random, each on the blocks that the search's ranking of the teacher gives it."""

    def draw(world: run.World, rng: random.Random) -> Candidate:
        sub = world.subs[0]
        return world.ranking.candidate(shape_of(sub.sample(rng)), sub.space)

    return _against(bench, "ranked", draw)


def _against(bench: Bench, who: str, draw: Draw) -> dict[str, Any]:
    """Drawn candidates trained on as many tokens as the super-network's, and the hypervolume of both.

    Both keep the budgets as foretold: random search asks the latency model too, and draws again.
    """
    ctx = bench.context()
    config, world = ctx.config, run.begin(ctx)
    budget = config.supernet.tokens * (ENDS + config.supernet.random_candidates)
    each = max(1, budget // bench.args.random)
    drawn = []
    for place, candidate in enumerate(_drawn(world, config.seed, bench.args.random, draw)):
        name = f"{who}-{place}"

        def make(candidate: Candidate = candidate, name: str = name) -> dict[str, Any]:
            start = extracted(bench, world, candidate, world.initial, name)
            return bench.trained(name, start, config.distilling(each), world.reader, world.heldout)

        drawn.append([bench.kept(name, make)[RANKED], world.costs.figures(candidate)["decode_ms"]])
    found = [one for one in bench.found()["candidates"] if one["feasible"]]
    ours = [[one["loss"][RANKED], one["predicted"]["decode_ms"]] for one in found]
    return {**compared(ours, drawn), "tokens": {"all": budget, "each": each}, "random": drawn}


def _drawn(world: run.World, seed: int, count: int, draw: Draw) -> list[Candidate]:
    """So many unlike candidates that keep the budgets as foretold."""
    rng, found = random.Random(seed), dict[str, Candidate]()
    while len(found) < count:
        candidate = draw(world, rng)
        if max(world.costs.excess(candidate).values(), default=0) <= 0:
            found.setdefault(candidate.digest, candidate)
    return list(found.values())


def compared(ours: list[list[float]], drawn: list[list[float]]) -> dict[str, Any]:
    """The hypervolume of `ours` over that of `drawn`, up to a reference a tenth beyond the worst of all of them.

    So no point lies on the edge of the box, where it would count nothing. Other references beside it: the worst of
    all, and a tenth of its extent beyond the joint front (None where no point of `drawn` comes so near to it).
    """
    points_NM = np.array([*ours, *drawn])
    beaten_NN = (points_NM[None] <= points_NM[:, None]).all(-1) & (points_NM[None] < points_NM[:, None]).any(-1)
    front_NM, worst_M = points_NM[~beaten_NN.any(1)], points_NM.max(0)
    boxes = {
        "ratio": (1 + MARGIN) * worst_M,
        "ratio_to_the_worst_of_all": worst_M,
        "ratio_near_the_front": front_NM.max(0) + MARGIN * np.ptp(front_NM, 0),
    }
    found: dict[str, Any] = {"reference": boxes["ratio"].tolist()}
    for name, box_M in boxes.items():
        searched, random_ones = (hypervolume(np.array(each), box_M) for each in (ours, drawn))
        found[name] = round(searched / random_ones, 4) if random_ones else None
    return found


def short(bench: Bench) -> dict[str, Any]:
    """Inherited losses against those after a short distillation, of candidates from the best to the worst."""
    from scipy.stats import spearmanr

    ctx = bench.context()
    config, world = ctx.config, run.begin(ctx)
    state = supernet_file(bench.searched.out, world.subs[0].name)
    tried = {one["digest"]: one for one in bench.found()["candidates"]}
    ordered = sorted(tried.values(), key=lambda one: (one["loss"][RANKED], one["digest"]))
    places = np.linspace(0, len(ordered) - 1, bench.args.short).round().astype(int)
    pairs = []
    for one in (ordered[place] for place in dict.fromkeys(places.tolist())):
        name = f"short-{one['digest'][:16]}"

        def make(one: dict[str, Any] = one, name: str = name) -> dict[str, Any]:
            start = extracted(bench, world, Candidate.from_json(one["candidate"]), state, name)
            return bench.trained(name, start, config.distilling(bench.args.short_tokens), world.reader, world.heldout)

        pairs.append([one["loss"][RANKED], bench.kept(name, make)[RANKED]])
    inherited, after = zip(*pairs, strict=True)
    return {
        "spearman": round(float(spearmanr(inherited, after).statistic), 4),
        "tokens": bench.args.short_tokens,
        "inherited_and_after": pairs,
    }


def timed(bench: Bench) -> dict[str, Any]:
    """Both shapes on this machine, in turns."""
    from lmdistill.search import device
    from lmdistill.search.profile import DECODE, Request, prefill_task

    hand = bench.hand_made()
    searched = bench.searched_shape()
    plan = replace(bench.config.timing.plan, rounds=4 * bench.config.timing.rounds)
    asked = Request(plan, hand, tuple({one.shape_digest: one for one in (searched, hand)}.values()))
    profile = device.run(asked, Path(bench.args.store) / "timed.json", bench.args.store / "work" / "timed")
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
    "ranked": ranked_search,
    "short": short,
    "equal": equal,
    "fresh": fresh,
    "starts": starts,
    "device": timed,
}
