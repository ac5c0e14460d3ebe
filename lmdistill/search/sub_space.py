"""A sub-space: the shapes within one band of cost, and random moves that stay in it.

Unlike sizes in one super-network disturb each other's weights; a space is therefore cut into bands (base, small,
tiny), each with a super-network and a search of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from operator import itemgetter

from lmdistill.errors import LmdistillError
from lmdistill.search.candidate import Candidate, Problem
from lmdistill.search.placement import Fitter, Picker, draw
from lmdistill.search.space import GENES, Cost, Shape, Space, shape_of

WHOLE = "all"  # the name of the one sub-space where none is asked for


class SubSpace:
    """Shapes that can ship and lie in one band; every candidate that comes out of it is one of them."""

    def __init__(self, name: str, space: Space, shapes: Sequence[Shape]) -> None:
        """Keep the shapes; raises LmdistillError where there is none."""
        if not shapes:
            raise LmdistillError(
                f"sub-space '{name}' has no candidate",
                why="no shape of the space lies between its bounds",
                fix="widen its bounds, or the space's sizes",
            )
        self.name, self.space = name, space
        self.shapes = sorted(shapes)
        self._known = frozenset(self.shapes)
        self._by_depth: dict[int, list[Shape]] = {}
        for shape in self.shapes:
            self._by_depth.setdefault(shape.depth, []).append(shape)

    @cached_property
    def _ends(self) -> tuple[Candidate, Candidate]:
        """Looked for among all shapes, and asked for at every step of a training."""
        sized = [(candidate.parameters, candidate) for candidate in self.one_of_each_shape()]
        return min(sized, key=itemgetter(0))[1], max(sized, key=itemgetter(0))[1]

    def largest(self) -> Candidate:
        """The candidate with most parameters, its blocks evenly spread."""
        return self._ends[1]

    def smallest(self) -> Candidate:
        """The candidate with fewest parameters, its blocks evenly spread."""
        return self._ends[0]

    def one_of_each_shape(self) -> Iterator[Candidate]:
        """A candidate of every shape, its blocks evenly spread: all that differ in cost."""
        return map(self.space.evenly, self.shapes)

    def problems(self, candidate: Candidate) -> list[Problem]:
        """Why a candidate is none of this sub-space or cannot ship; nothing for what comes out of it."""
        found = candidate.problems(self.space.format_name)
        if shape_of(candidate) not in self._known or self._built(candidate) != candidate:
            found.append((f"its shape is not in sub-space '{self.name}'", "propose shapes of the space"))
        if not set(candidate.sources) <= set(range(self.space.blocks)):
            found.append((f"the teacher has {self.space.blocks} blocks", "inherit from one of them"))
        attending = {layer.source for layer in candidate.layers if layer.operator == "attention"}
        if strange := sorted(attending - self.space.attention_at):
            found.append((f"block {strange[0]} may not attend", "see attention_at"))
        return found

    def _built(self, candidate: Candidate) -> Candidate:
        return self.space.build(shape_of(candidate), {layer.source: layer.operator for layer in candidate.layers})

    def sample(self, rng: random.Random) -> Candidate:
        """A random candidate: its depth first, then a shape of this depth, then its blocks."""
        shape = rng.choice(self._by_depth[rng.choice(sorted(self._by_depth))])
        space = self.space
        return space.build(shape, draw(shape.depth, shape.attention, space.blocks, space.attention_at, rng))

    def mutate(self, candidate: Candidate, pick: Picker) -> Candidate:
        """One random change: another value of a gene, another source of a layer, or attention moved elsewhere."""
        moves = [self._other_source, self._moved_attention, self._other_shape, self._other_shape]
        pick.rng.shuffle(moves)
        return next((changed for move in moves if (changed := move(candidate, pick)) != candidate), candidate)

    def _fitter(self, pick: Picker) -> Fitter:
        return Fitter(self.space.blocks, self.space.attention_at, pick)

    def _other_shape(self, candidate: Candidate, pick: Picker) -> Candidate:
        now, rng = shape_of(candidate), pick.rng
        for gene in rng.sample(GENES, len(GENES)):
            alike = (shape for shape in self.shapes if replace(shape, **{gene: 0}) == replace(now, **{gene: 0}))
            if values := sorted({getattr(shape, gene) for shape in alike} - {getattr(now, gene)}):
                shape = replace(now, **{gene: rng.choice(values)})
                placement = {layer.source: layer.operator for layer in candidate.layers}
                return self.space.build(shape, self._fitter(pick).fit(placement, shape.depth, shape.attention))
        return candidate

    def _other_source(self, candidate: Candidate, pick: Picker) -> Candidate:
        placement = {layer.source: layer.operator for layer in candidate.layers}
        block = pick.leave(sorted(placement))
        operator = placement[block]
        allowed = self.space.attention_at if operator == "attention" else range(self.space.blocks)
        if unused := sorted(set(allowed) - set(placement)):
            del placement[block]
            placement[pick.take(unused)] = operator
        return self.space.build(shape_of(candidate), placement)

    def _moved_attention(self, candidate: Candidate, pick: Picker) -> Candidate:
        placement = {layer.source: layer.operator for layer in candidate.layers}
        giving = sorted(block for block, operator in placement.items() if operator == "attention")
        taking = sorted(b for b, operator in placement.items() if operator == "conv" and b in self.space.attention_at)
        if giving and taking:
            placement[pick.convolve(giving)], placement[pick.attend(taking)] = "conv", "attention"
        return self.space.build(shape_of(candidate), placement)

    def crossover(self, first: Candidate, second: Candidate, pick: Picker) -> Candidate:
        """A child whose every gene is one of its parents', whose blocks are theirs as far as its depth allows."""
        pairs = [(getattr(shape_of(first), gene), getattr(shape_of(second), gene)) for gene in GENES]
        shapes = sorted({Shape(*genes) for genes in product(*pairs)} & self._known)
        rng = pick.rng
        shape = rng.choice(shapes)
        mine, theirs = ({layer.source: layer.operator for layer in parent.layers} for parent in (first, second))
        placement = {}
        for block in sorted(mine | theirs):
            having = [parent[block] for parent in (mine, theirs) if block in parent]
            if len(having) == 2 or rng.random() < 0.5:
                placement[block] = rng.choice(having)
        return self.space.build(shape, self._fitter(pick).fit(placement, shape.depth, shape.attention))


def whole(space: Space) -> SubSpace:
    """The whole space as one sub-space; raises LmdistillError where it has no candidate."""
    return SubSpace(WHOLE, space, space.shapes())


def sub_spaces(space: Space, cost: Cost | None = None) -> list[SubSpace]:
    """The sub-spaces that the keys name, or the whole space as one; `cost` is needed where a band is by decode_ms.

    Raises LmdistillError where one has no candidate.
    """
    if not space.keys.sub_spaces:
        return [whole(space)]
    shapes = space.shapes()
    candidates = {shape: space.evenly(shape) for shape in shapes}
    return [
        SubSpace(name, space, [shape for shape, candidate in candidates.items() if band.holds(candidate, cost)])
        for name, band in space.keys.sub_spaces.items()
    ]
