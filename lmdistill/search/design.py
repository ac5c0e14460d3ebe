"""Which candidates are timed to learn a device's paces: few, and as unlike each other as the space allows."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from lmdistill.search import features
from lmdistill.search.candidate import Candidate, Layer, of_unlike_shapes
from lmdistill.search.profile import Request, TimingPlan
from lmdistill.search.sub_space import SubSpace

_POOL = 20  # shapes drawn for each one that is taken


def spread_out(sub: SubSpace, count: int, seed: int) -> list[Candidate]:
    """`count` shapes of a sub-space: its extremes, then always the one farthest from all that are taken.

    Distance is that of the logarithms of the amounts of work in a token. Fewer where there are no more shapes.
    """
    rng = random.Random(seed)
    pool = of_unlike_shapes([sub.largest(), sub.smallest(), *(sub.sample(rng) for _ in range(_POOL * count))])
    places = [[math.log1p(amount) for amount in features.decode(candidate)] for candidate in pool]
    taken = [0]
    far = [math.dist(place, places[0]) for place in places]
    while len(taken) < min(count, len(pool)):
        left = [index for index in range(len(pool)) if index not in taken]  # unlike shapes may do equal work
        taken.append(1 if len(taken) == 1 else max(left, key=far.__getitem__))
        far = [min(d, math.dist(place, places[taken[-1]])) for d, place in zip(far, places, strict=True)]
    return [pool[index] for index in taken]


def teacher_candidate(teacher: Mapping[str, Any]) -> Candidate:
    """The teacher as a candidate, by its config.json: a stack of attention and gated MLPs, timed as a llama."""
    heads, layers = int(teacher["num_attention_heads"]), int(teacher["num_hidden_layers"])
    return Candidate(
        architecture="llama",
        layers=tuple(Layer(index, "attention") for index in range(layers)),
        hidden_size=int(teacher["hidden_size"]),
        intermediate_size=int(teacher["intermediate_size"]),
        heads=heads,
        kv_heads=int(teacher.get("num_key_value_heads") or heads),
        head_dim=int(teacher.get("head_dim") or teacher["hidden_size"] // heads),
        kernel=2,
        vocab_size=int(teacher["vocab_size"]),
    )


def request(sub: SubSpace, teacher: Mapping[str, Any], plan: TimingPlan, count: int, seed: int = 0) -> Request:
    """What a device shall time for a space: `count` shapes, with the teacher beside each group of them as reference.

    So a budget relative to the teacher is a ratio of times from the same rounds, and no single timing of the teacher's
    is in all of them. Where the teacher cannot be timed, the median shape is the reference.
    """
    chosen = spread_out(sub, count, seed)
    own = teacher_candidate(teacher)
    if not own.problems(plan.format):
        return Request(plan, own, (own, *chosen))
    by_size = sorted(chosen, key=lambda candidate: candidate.parameters)
    return Request(plan, by_size[len(by_size) // 2], tuple(chosen))
