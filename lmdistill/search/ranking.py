"""Which blocks of the teacher a student can do without, and where it can do without attention: by measured KL.

One-shot: each block is left out alone, and its cost is the KL to the whole teacher. Greedy: the cheapest is left out,
then the cheapest of what remains, as a student is grown. Either gives an order of blocks, from the first to go to the
last; a placement keeps the blocks that go last. Noise on the ranks turns the one placement into random ones near it.

Axes: R rows, T positions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Progress
from lmdistill.search.candidate import Candidate
from lmdistill.search.placement import Placement, RankedPicker
from lmdistill.search.space import Shape, Space
from lmdistill.students.selection import Fate, PlanScorer, greedy_order


@dataclass(frozen=True)
class Ranking:
    """Blocks of the teacher from the first to go to the last: as a whole, and as a place of attention."""

    gone: tuple[int, ...]
    local: tuple[int, ...]

    def placement(self, shape: Shape, space: Space, rng: random.Random | None = None, noise: float = 0.0) -> Placement:
        """The blocks that are dearest to keep, and of those attention where it is dearest, under noise on the ranks."""
        keep = _scores(self.gone, rng, noise)
        attend = _scores(self.local, rng, noise)
        kept = sorted(range(space.blocks), key=lambda block: -keep[block])[: shape.depth]
        allowed = [block for block in kept if block in space.attention_at]
        # Too few of the kept blocks may attend: the dearest allowed ones take the place of the cheapest others.
        for block in sorted(space.attention_at - set(kept), key=lambda block: -keep[block]):
            if len(allowed) >= shape.attention:
                break
            kept.remove(min((b for b in kept if b not in space.attention_at), key=lambda b: keep[b]))
            kept.append(block)
            allowed.append(block)
        attending = set(sorted(allowed, key=lambda block: -attend[block])[: shape.attention])
        return {block: "attention" if block in attending else "conv" for block in sorted(kept)}

    def candidate(self, shape: Shape, space: Space, rng: random.Random | None = None, noise: float = 0.0) -> Candidate:
        """The candidate of a shape with that placement."""
        return space.build(shape, self.placement(shape, space, rng, noise))

    def picker(self, rng: random.Random, noise: float) -> RankedPicker:
        """What random changes take, under noise on the ranks."""
        return RankedPicker(self.gone, self.local, rng, noise)


def _scores(order: Sequence[int], rng: random.Random | None, noise: float) -> dict[int, float]:
    """Each block's place in the order, the last one highest, with `noise` places' worth of noise on it."""
    return {block: place + (rng.gauss(0, noise) if rng else 0.0) for place, block in enumerate(order)}


def rank(source: Any, tokens_RT: torch.Tensor, space: Space, width: int, kept: Path, progress: Progress) -> Ranking:
    """The ranking of an all-attention model's blocks; `width` 0 is one-shot, else greedy with so many tries a step."""
    if kept.exists():
        return Ranking(**{name: tuple(order) for name, order in json.loads(kept.read_text()).items()})
    scorer = PlanScorer(source, tokens_RT)
    fewest = min(space.depths)
    gone = _order(scorer, "gone", space.blocks - fewest, width, progress)
    least = min(space.attention_numbers(fewest), default=fewest)
    local = _order(scorer, "local", space.blocks - least, width, progress) if space.keys.hybrid else gone
    ranking = Ranking(gone, local)
    write_json(kept, asdict(ranking))
    return ranking


def _order(scorer: PlanScorer, fate: Fate, count: int, width: int, progress: Progress) -> tuple[int, ...]:
    whole: list[Fate] = ["full"] * len(scorer.layers)

    def alone(block: int) -> float:
        return scorer.score([fate if place == block else "full" for place in range(len(whole))])

    def report(step: int, steps: int, kl: float) -> None:
        progress.update(step, steps, f"blocks ranked ({fate})", kl=round(kl, 4))

    scorer.adopt(whole)
    first = greedy_order(scorer, whole, fate, count, width, report) if width else []
    scorer.adopt(whole)
    rest = [block for block in range(len(whole)) if block not in first]
    return (*first, *sorted(rest, key=lambda block: (alone(block), block)))
