"""How the candidates of a sub-space are found: one decorated function a method.

`supernet` trains shared weights and evolves candidates on them; `prune` cuts the teacher once, by measured importance,
into as many shapes as it may try. Either gives scored candidates, generation by generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.errors import RecipeError, nearest
from lmdistill.search.scored import Scored, Scores
from lmdistill.search.space import Shape, shape_of

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import Progress
    from lmdistill.search.config import SearchConfig
    from lmdistill.search.heldout import HeldOutLoss, TrainingRows
    from lmdistill.search.ranking import Ranking
    from lmdistill.search.scored import Device
    from lmdistill.search.sub_space import SubSpace
    from lmdistill.search.supernet import SuperNet
    from lmdistill.training.run import Place


@dataclass(frozen=True)
class Ground:
    """What a method works on; the super-network is as it was made."""

    config: SearchConfig
    sub: SubSpace
    net: SuperNet
    ranking: Ranking
    reader: TrainingRows
    heldout: HeldOutLoss
    device: Device
    place: Place  # `work` is the sub-space's own
    progress: Progress

    def scores(self, file: str) -> Scores:
        """Scores of the super-network's candidates, kept in a file."""
        self.net.prepare_with(self.heldout.prepare)

        def loss_of(candidate: object) -> dict[str, float]:
            return self.heldout.of(lambda **inputs: self.net.run(candidate, **inputs))  # type: ignore[arg-type]

        return Scores(loss_of, self.device, self.place.work / file)


@dataclass(frozen=True)
class Found:
    """What a method found."""

    generations: list[list[Scored]]
    curve: list[dict[str, float]]  # of the super-network's training
    state: Path | None  # the weights that candidates inherit; None: those the super-network was made with


Method = Callable[[Ground], Found]
_METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a function under `name`, the value of search's `method:`."""

    def register(function: Method) -> Method:
        _METHODS[name] = function
        return function

    return register


def methods() -> dict[str, str]:
    """All methods by name, with what they do."""
    return {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in sorted(_METHODS.items())}


def find_method(name: str) -> Method:
    """The method called `name`; RecipeError with the nearest name where there is none."""
    if name in _METHODS:
        return _METHODS[name]
    raise RecipeError(
        f"no method of search is called '{name}'{nearest(name, _METHODS)}", fix=f"one of: {', '.join(methods())}"
    )


@method("supernet")
def supernet(ground: Ground) -> Found:
    """Train shared weights by sandwich steps, then evolve candidates on them."""
    from lmdistill.search.evolve import Evolution, evolve
    from lmdistill.search.sandwich import TRAINED, Sandwich, train_supernet

    config, keys = ground.config, ground.config.evolution
    shared = config.supernet
    sandwich = Sandwich(ground.sub, ground.ranking, shared.random_candidates, shared.placement_noise, config.seed)
    work = ground.place.work / "training"
    curve = train_supernet(
        ground.net,
        sandwich.candidates,
        ground.reader,
        config.distilling(shared.tokens),
        replace(ground.place, work=work),
        ground.progress,
        shared.relations,
    )
    scores = ground.scores("scores.jsonl")
    noise = shared.placement_noise
    how = Evolution(keys.population, keys.generations, keys.crossover, config.objectives, config.seed, noise)

    def report(done: int, total: int, scored: Scored) -> None:
        ground.progress.update(done, total, "candidates", kd=round(scored.loss["kd"], 4))

    first = [ground.ranking.candidate(shape, ground.sub.space) for shape in beginning(ground, keys.population)]
    return Found(evolve(ground.sub, first, scores.of, how, report, ground.ranking), curve, work / TRAINED)


@method("prune")
def prune(ground: Ground) -> Found:
    """Cut the teacher once by importance, to shapes that keep the budgets: the cheap way, without shared training."""
    scores = ground.scores("scores.jsonl")
    shapes = one_shot_shapes(ground, ground.config.evolution.population)
    found = []
    for shape in shapes:
        found.append(scores.of(ground.ranking.candidate(shape, ground.sub.space)))
        ground.progress.update(len(found), len(shapes), "candidates", kd=round(found[-1].loss["kd"], 4))
    return Found([found], [], None)


def beginning(ground: Ground, count: int) -> list[Shape]:
    """At most `count` shapes to begin with: half of them one-shot ones, half those nearest to the budgets.

    Of each depth and widths the nearest one is that with most attention, which is inherited as it is.
    """
    spread = one_shot_shapes(ground, -(-count // 2))
    nearest: dict[Shape, tuple[int, float]] = {}
    for shape, (excess, _) in _allowed(ground).items():
        nearest[replace(shape, attention=0)] = max(
            nearest.get(replace(shape, attention=0), (0, 0.0)), (shape.attention, excess)
        )
    tight = sorted(nearest, key=lambda shape: (-nearest[shape][1], shape))
    found = [*spread, *(replace(shape, attention=nearest[shape][0]) for shape in tight)]
    return list(dict.fromkeys(found))[:count]


def one_shot_shapes(ground: Ground, count: int) -> list[Shape]:
    """At most `count` shapes that keep the budgets, evenly from the slowest to the fastest; of all where none does.

    The slowest that is allowed is the best guess: it has most of the teacher left.
    """
    costs = _allowed(ground)
    allowed = sorted(costs, key=lambda shape: (-costs[shape][1], shape))
    count = min(count, len(allowed))
    return [allowed[place * (len(allowed) - 1) // max(1, count - 1)] for place in range(count)]


def _allowed(ground: Ground) -> dict[Shape, tuple[float, float]]:
    """The shapes that keep the budgets, or all where none does: the worst excess, milliseconds of a token."""
    costs = {}
    for shape in ground.sub.shapes:
        candidate = ground.ranking.candidate(shape, ground.sub.space)
        assert shape_of(candidate) == shape
        excess = max(ground.device.excess(candidate).values(), default=0.0)
        costs[shape] = (excess, ground.device.figures(candidate)["decode_ms"])
    return {shape: each for shape, each in costs.items() if each[0] <= 0} or costs
