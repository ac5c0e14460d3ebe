"""Multi-objective evolution of candidates with Optuna's NSGA-II: it selects, the sub-space's own moves make children.

To Optuna a candidate is its genes: what each block of the teacher becomes, and the widths. Children are made by
the sub-space's own crossover or mutation, of parents that nothing beats: every trial is a student that can ship. With
a ranking of the teacher's blocks, what is random of a placement is what the ranking says under noise: of thirty blocks
most sets cannot work, and a search of fifty candidates has none to lose on them.
Budgets are constraints: a candidate that exceeds them less is better than one that exceeds them more, and both are
worse than any that keeps them. The same seed makes the same search.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lmdistill.search.candidate import Candidate, Operator
from lmdistill.search.front import front
from lmdistill.search.placement import Picker
from lmdistill.search.scored import RANKED, Scored
from lmdistill.search.space import Shape, shape_of
from lmdistill.search.sub_space import SubSpace

if TYPE_CHECKING:
    import optuna

    from lmdistill.search.ranking import Ranking

GONE = "gone"
ATTEMPTS = 20  # at a candidate that was not tried before
WIDTHS = tuple(field.name for field in fields(Shape) if field.name not in ("depth", "attention"))
Genes = dict[str, Any]
Score = Callable[[Candidate], Scored]
Report = Callable[[int, int, Scored], None]


@dataclass(frozen=True)
class Evolution:
    """How long and how wide."""

    population: int
    generations: int
    crossover: float
    objectives: tuple[str, ...]
    seed: int
    noise: float = 0.0  # on a ranking, in places


def genes_of(candidate: Candidate, blocks: int) -> Genes:
    """A candidate as Optuna knows it."""
    placed = {layer.source: layer.operator for layer in candidate.layers}
    shape = shape_of(candidate)
    return {
        **{f"block_{block:03d}": placed.get(block, GONE) for block in range(blocks)},
        **{width: getattr(shape, width) for width in WIDTHS},
    }


def candidate_of(genes: Genes, sub: SubSpace) -> Candidate:
    """The candidate with these genes."""
    placed: dict[int, Operator] = {
        int(name.removeprefix("block_")): value
        for name, value in genes.items()
        if name.startswith("block_") and value != GONE
    }
    attention = sum(operator == "attention" for operator in placed.values())
    shape = Shape(depth=len(placed), attention=attention, **{width: genes[width] for width in WIDTHS})
    return sub.space.build(shape, placed)


class _Children:
    """Makes candidates: those that begin, then children that stay in the sub-space and are not there already."""

    def __init__(
        self, sub: SubSpace, first: Sequence[Candidate], how: Evolution, ranking: Ranking | None = None
    ) -> None:
        self.sub, self.how, self.ranking = sub, how, ranking
        self.beginners = self._beginners(first)
        self.tried: dict[str, Scored] = {}

    def next(self, number: int, parents: Sequence[Candidate]) -> Candidate:
        """The candidate of trial `number`; without parents one of those that begin."""
        if not parents:
            return self.beginners[number]
        pick = self._picker(random.Random(f"{self.how.seed} child {number}"))
        child = self._child(parents, pick)
        for _ in range(ATTEMPTS):
            if child.digest not in self.tried:
                break
            child = self.sub.mutate(child, pick)
        return child

    def _picker(self, rng: random.Random) -> Picker:
        return self.ranking.picker(rng, self.how.noise) if self.ranking else Picker(rng)

    def _beginners(self, first: Sequence[Candidate]) -> list[Candidate]:
        """A population of `first` and random candidates; the same one twice only where there are too few."""
        population, rng = self.how.population, random.Random(f"{self.how.seed} first")
        drawn = [*first, *(self._drawn(rng) for _ in range(population * ATTEMPTS))]
        unlike = list({one.digest: one for one in drawn}.values())[:population]
        return unlike + drawn[-1:] * (population - len(unlike))

    def _drawn(self, rng: random.Random) -> Candidate:
        drawn = self.sub.sample(rng)
        return self.ranking.candidate(shape_of(drawn), self.sub.space, rng, self.how.noise) if self.ranking else drawn

    def _child(self, parents: Sequence[Candidate], pick: Picker) -> Candidate:
        leading, rng = self._leading(parents), pick.rng
        if len(leading) > 1 and rng.random() < self.how.crossover:
            first, second = rng.sample(leading, 2)
            return self.sub.crossover(first, second, pick)
        return self.sub.mutate(self._better(rng.choices(leading, k=2)), pick)

    def _better(self, two: Sequence[Candidate]) -> Candidate:
        """The one of the lower loss: a front has fast candidates too that nobody would take."""
        return min(two, key=lambda one: self.tried[one.digest].loss[RANKED])

    def _leading(self, parents: Sequence[Candidate]) -> list[Candidate]:
        """The parents that no other one beats; where none keeps the budgets, the half that misses them least."""
        scored = [self.tried[one.digest] for one in parents]
        missing = sorted(scored, key=lambda one: sum(max(0.0, each) for each in one.excess.values()))
        leading = front(scored, self.how.objectives) or missing[: -(-len(missing) // 2)]
        return [one.candidate for one in leading]


def evolve(
    sub: SubSpace,
    first: Sequence[Candidate],
    score: Score,
    how: Evolution,
    report: Report = lambda *_: None,
    ranking: Ranking | None = None,
) -> list[list[Scored]]:
    """All candidates tried, generation by generation; `first` begin, and random ones fill up the first generation."""
    children, space = _Children(sub, first, how, ranking), _distributions(sub)
    study = _study(children, space, how)
    generations: list[list[Scored]] = []
    for number in range(how.population * how.generations):
        if number % how.population == 0:
            generations.append([])
        trial = study.ask(space)
        candidate = candidate_of(trial.params, sub)
        scored = children.tried[candidate.digest] = score(candidate)
        _tell(study, trial, scored, how)
        generations[-1].append(scored)
        report(number + 1, how.population * how.generations, scored)
    return generations


def _distributions(sub: SubSpace) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution

    fates = (GONE, "attention", "conv") if sub.space.keys.hybrid else (GONE, "attention")
    return {
        **{f"block_{block:03d}": CategoricalDistribution(fates) for block in range(sub.space.blocks)},
        **{width: CategoricalDistribution(sorted({getattr(shape, width) for shape in sub.shapes})) for width in WIDTHS},
    }


def _study(children: _Children, space: dict[str, Any], how: Evolution) -> optuna.Study:
    import optuna

    class Sampler(optuna.samplers.NSGAIISampler):  # type: ignore[misc]
        """Optuna's selection; candidates come from `children`."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {name: distribution for name, distribution in space.items() if not distribution.single()}

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> Genes:
            parents = self.get_parent_population(study, self.get_trial_generation(study, trial))
            candidate = children.next(trial.number, [candidate_of(one.params, children.sub) for one in parents])
            genes = genes_of(candidate, children.sub.space.blocks)
            return {name: genes[name] for name in search_space}

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = Sampler(population_size=how.population, seed=how.seed)
    return optuna.create_study(directions=["minimize"] * (1 + len(how.objectives)), sampler=sampler)


def _tell(study: optuna.Study, trial: Any, scored: Scored, how: Evolution) -> None:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, excess in scored.excess.items():
            trial.set_constraint(name, excess)
    study.tell(trial, list(scored.values(how.objectives)))
