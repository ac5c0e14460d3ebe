"""The evolution: it stays in its space, follows budgets, is the same for a seed, and beats chance."""

from __future__ import annotations

import random
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdistill.search.candidate import Candidate
from lmdistill.search.evolve import Evolution, candidate_of, evolve, genes_of
from lmdistill.search.finalists import chosen
from lmdistill.search.front import front, hypervolume, reference_of
from lmdistill.search.ranking import Ranking
from lmdistill.search.scored import Scored
from lmdistill.search.space import Space, SpaceConfig, shape_of
from lmdistill.search.sub_space import SubSpace, sub_spaces

TEACHER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KEYS: dict[str, Any] = {"depth": [4, 8], "intermediate_sizes": [256, 384, 512], "kernels": [2, 3]}
OBJECTIVES = ("decode_ms",)


def sub_of(**keys: Any) -> SubSpace:
    return sub_spaces(Space(SpaceConfig(**{**KEYS, **keys}), TEACHER, "q4_0"))[0]


SUB = sub_of()


def score(candidate: Candidate, limit: float = 1e9) -> Scored:
    """Early blocks and attention at even ones are worth most; parameters cost time."""
    worth = sum(
        1 / (1 + layer.source) + (layer.operator == "attention") * (layer.source % 2 == 0) * 0.3
        for layer in candidate.layers
    )
    decode_ms = candidate.parameters / 1e6
    loss = {"kd": 5 - worth - candidate.intermediate_size / 1024, "ce": 1.0}
    return Scored(candidate, loss, {"decode_ms": decode_ms}, {"budget": decode_ms / limit - 1})


@given(st.integers(0, 2**32))
def test_genes_say_all_of_a_candidate(seed: int) -> None:
    candidate = SUB.sample(random.Random(seed))
    assert candidate_of(genes_of(candidate, SUB.space.blocks), SUB) == candidate


def test_every_candidate_can_ship_none_is_tried_twice_and_a_seed_gives_one_search() -> None:
    how = Evolution(8, 4, 0.5, OBJECTIVES, 1)
    first, again = (evolve(SUB, [], score, how) for _ in range(2))
    found = [one.candidate for generation in first for one in generation]
    assert [len(generation) for generation in first] == [8] * 4
    assert all(SUB.problems(candidate) == [] for candidate in found)
    assert len({candidate.digest for candidate in found}) == len(found)
    assert first == again
    assert evolve(SUB, [], score, Evolution(8, 4, 0.5, OBJECTIVES, 2)) != first


def test_what_is_given_begins_the_first_generation() -> None:
    rng = random.Random(0)
    given_ = [SUB.sample(rng), SUB.sample(rng)]
    (generation,) = evolve(SUB, given_, score, Evolution(4, 1, 0.5, OBJECTIVES, 0))
    assert [one.candidate for one in generation[:2]] == given_


def test_searches_leave_less_behind_than_chance_does_with_as_many_tries() -> None:
    ends, ratios = [SUB.smallest(), SUB.largest()], []
    for seed in range(4):
        how = Evolution(12, 8, 0.5, OBJECTIVES, seed)
        evolved = [one for generation in evolve(SUB, ends, score, how) for one in generation]
        rng = random.Random(f"chance {seed}")
        drawn = [*map(score, ends), *(score(SUB.sample(rng)) for _ in evolved[len(ends) :])]
        reference = reference_of([*evolved, *drawn], OBJECTIVES)
        points = (np.array([one.values(OBJECTIVES) for one in each]) for each in (evolved, drawn))
        ours, chance = (hypervolume(each, reference) for each in points)
        ratios.append(ours / chance)
    assert min(ratios) > 1 and sum(ratios) / len(ratios) > 1.06


def test_generations_move_towards_a_budget_that_random_candidates_miss() -> None:
    limit = sorted(one.parameters / 1e6 for one in SUB.one_of_each_shape())[5]
    rng = random.Random(0)
    drawn = (SUB.sample(rng) for _ in range(100))
    begin = [one for one in drawn if not score(one, limit).feasible][:10]
    generations = evolve(SUB, begin, lambda one: score(one, limit), Evolution(10, 8, 0.5, OBJECTIVES, 0))
    kept = [sum(one.feasible for one in generation) for generation in generations]
    chance = sum(score(SUB.sample(rng), limit).feasible for _ in range(100)) / 100
    assert kept[0] == 0 and sum(kept[2:]) / 60 > 3 * chance > 0


def test_the_front_is_what_nothing_beats() -> None:
    rng = random.Random(4)
    scored = [score(SUB.sample(rng), 2.5) for _ in range(60)]
    found = front(scored, OBJECTIVES)
    values = [one.values(OBJECTIVES) for one in found]
    assert found and all(one.feasible for one in found)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(values))
    for one in scored:
        if one.feasible and one not in found:
            assert any(a[0] <= one.values(OBJECTIVES)[0] and a[1] <= one.values(OBJECTIVES)[1] for a in values)


def test_hypervolume_is_the_area_that_is_counted_by_hand() -> None:
    points = np.array([[1.0, 3.0], [2.0, 1.0], [3.5, 0.5], [2.5, 2.5]])
    # in a box of 4 × 4: 3 × 1 of the first alone, 2 × 2 more below it, 0.5 × 0.5 more of the third
    assert hypervolume(points, np.array([4.0, 4.0])) == pytest.approx((3 * 1 + 2 * 2 + 0.5 * 0.5) / 16)
    assert hypervolume(np.array([[5.0, 1.0]]), np.array([4.0, 4.0])) == 0.0


def test_finalists_are_the_front_and_then_the_lowest_losses() -> None:
    rng = random.Random(4)
    scored = [score(SUB.sample(rng)) for _ in range(30)]
    best = front(scored, OBJECTIVES)
    few, many = chosen(scored, OBJECTIVES, 2), chosen(scored, OBJECTIVES, len(best) + 3)
    assert few == best[:2]
    assert many[: len(best)] == best and len({one.candidate.digest for one in many}) == len(best) + 3


RANKING = Ranking(gone=tuple(range(9, -1, -1)), local=tuple(range(10)))


def test_a_placement_keeps_the_blocks_that_go_last() -> None:
    shape = next(shape for shape in SUB.shapes if shape.depth == 5 and shape.attention == 2)
    assert RANKING.placement(shape, SUB.space) == {0: "conv", 1: "conv", 2: "conv", 3: "attention", 4: "attention"}


def test_a_picker_without_noise_takes_what_the_ranking_says() -> None:
    pick = RANKING.picker(random.Random(0), 0.0)
    assert (pick.leave([2, 5, 3]), pick.take([2, 5, 3])) == (5, 2)
    assert (pick.convolve([2, 5, 3]), pick.attend([2, 5, 3])) == (2, 5)


def test_a_ranking_of_the_blocks_finds_more_than_a_search_without_one() -> None:
    """The blocks that the ranking has last are the best ones here; its places of attention are half wrong."""
    budget = sorted(one.parameters / 1e6 for one in SUB.one_of_each_shape())[len(SUB.shapes) // 3]
    best: dict[bool, list[float]] = {True: [], False: []}
    for seed, ranked in product(range(12), best):
        how = Evolution(6, 3, 0.5, OBJECTIVES, seed, noise=2.0)
        found = evolve(SUB, [], lambda one: score(one, budget), how, ranking=RANKING if ranked else None)
        best[ranked].append(min(one.loss["kd"] for each in found for one in each if one.feasible))
    assert sum(best[True]) < 0.8 * sum(best[False])


@given(st.integers(0, 2**32), st.floats(0, 20), st.sampled_from([None, [1, 5, 9], [0, 2, 4, 6, 8]]))
def test_noisy_placements_stay_in_the_space(seed: int, noise: float, attention_at: list[int] | None) -> None:
    sub = SUB if attention_at is None else sub_of(attention_at=attention_at, attention_layers=[1, len(attention_at)])
    rng = random.Random(seed)
    shape = shape_of(sub.sample(rng))
    candidate = RANKING.candidate(shape, sub.space, rng, noise)
    assert sub.problems(candidate) == [] and shape_of(candidate) == shape
