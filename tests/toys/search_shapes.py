"""A toy teacher, its space, and profiles of devices whose paces are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from lmdistill.search import features
from lmdistill.search.candidate import Candidate
from lmdistill.search.profile import DECODE, Measured, Profile, TimingPlan, prefill_task
from lmdistill.search.space import Space, SpaceConfig
from lmdistill.search.sub_space import SubSpace, whole

TOY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TOY_KEYS: dict[str, Any] = {
    "depth": [2, 6],
    "attention_layers": [1, 4],
    "hidden_sizes": [64, 128, 256],
    "intermediate_sizes": [64, 128, 256, 512],
    "kv_heads": [1, 2, 4],
}


def toy_space(**changed: Any) -> Space:
    return Space(SpaceConfig(**{**TOY_KEYS, **changed}), TOY, "q4_0")


def toy_whole() -> SubSpace:
    return whole(toy_space())


DECODE_PACES = [4e-4, 3e-5, 2e-5, 6e-5, 5e-5, 3e-5, 1e-5, 1.3e-5]
PREFILL_PACES = [1e-4, 1e-5, 4e-3, 3e-3, 2.5e-3, 2e-4, 1e-4, 5e-5, 3e-4, 2e-5, 2e-5]


def known_seconds(candidate: Candidate, task: str, plan: TimingPlan) -> float:
    """What the task takes on a device of those paces."""
    if task == DECODE:
        work = features.decode(candidate)
        return plan.decode * sum(pace * amount for pace, amount in zip(DECODE_PACES, work, strict=True))
    work = features.prefill(candidate, plan.tasks[task])
    return sum(pace * amount for pace, amount in zip(PREFILL_PACES, work, strict=True))


def known_profile(
    candidates: list[Candidate],
    reference: Candidate,
    slowdown: Callable[[int], float] = lambda group: 1.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Profile:
    """A profile of that device; `slowdown` of each group of four by its number, `noise` of every single time."""
    plan, rng = TimingPlan(prompts=(512, 1024), rounds=5), random.Random(seed)
    profile = Profile(plan, reference, {"machine": "toy", "processor": "toy"})
    for index, candidate in enumerate(candidates):
        slow = slowdown(index // 4)

        def times(of: Candidate, task: str, slow: float = slow) -> list[float]:
            exact = slow * known_seconds(of, task, plan)
            return [exact * rng.lognormvariate(0, noise) for _ in range(plan.rounds)]

        tasks = [*map(prefill_task, plan.prompts), DECODE]
        rss = 60e6 + 1.1e6 * candidate.parameters / 1e6
        profile.add(
            [
                Measured(
                    candidate,
                    {task: times(candidate, task) for task in tasks},
                    {task: times(reference, task) for task in tasks},
                    int(rss),
                    int(2e6 + 0.5625 * candidate.parameters),
                )
            ]
        )
    return profile
