"""Candidates and their space: whatever comes out of it can ship."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmdistill.deployment.planned import parameters_by, student_ahead
from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.pipeline.stage import Planned, PreflightContext
from lmdistill.search.ahead import largest
from lmdistill.search.candidate import Candidate, Layer
from lmdistill.search.config import SearchConfig
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.placement import Picker, RankedPicker
from lmdistill.search.space import Space, SpaceConfig
from lmdistill.search.space_problems import open_space, problems
from lmdistill.search.sub_space import SubSpace, sub_spaces
from lmdistill.training.config import DistillConfig

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
KEYS: dict[str, Any] = {
    "depth": [8, 24],
    "attention_layers": [2, 12],
    "hidden_sizes": [384, 576],
    "intermediate_sizes": [768, 1024, 1536],
    "kv_heads": [1, 3],
    "kernels": [3, 4],
}
SPACES = [
    KEYS,
    {"operators": ["attention"], "depth": [2, 30]},
    {**KEYS, "attention_at": [0, 3, 7, 11, 15, 19, 29], "attention_layers": [1, 7], "depth": [7, 30]},
    {**KEYS, "sub_spaces": {"base": {"parameters": [70, 200]}, "tiny": {"parameters": [20, 40]}}},
]


def space_of(keys: dict[str, Any], format_name: str = "q4_0") -> Space:
    return Space(SpaceConfig(**keys), SMOLLM2, format_name)


ALL = [sub for keys in SPACES for sub in sub_spaces(space_of(keys))]


def picker(seed: int, ranked: bool) -> Picker:
    rng = random.Random(seed)
    order = rng.sample(range(SMOLLM2["num_hidden_layers"]), SMOLLM2["num_hidden_layers"])
    return RankedPicker(order, order[::-1], rng, 3.0) if ranked else Picker(rng)


@given(st.sampled_from(ALL), st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=100)
def test_whatever_is_sampled_mutated_or_crossed_can_ship_and_stays_in_its_sub_space(
    sub: SubSpace, seed: int, ranked: bool
) -> None:
    pick = picker(seed, ranked)
    first, second = sub.sample(pick.rng), sub.sample(pick.rng)
    child = sub.crossover(first, second, pick)
    mutants = [first]
    for _ in range(5):
        mutants.append(sub.mutate(mutants[-1], pick))
    for candidate in (first, second, child, *mutants):
        assert sub.problems(candidate) == []
        assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate
    for gene in ("depth", "hidden_size", "intermediate_size", "kv_heads", "kernel"):
        assert getattr(child, gene) in (getattr(first, gene), getattr(second, gene))


@given(st.sampled_from(ALL), st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_mutation_changes_something(sub: SubSpace, seed: int, ranked: bool) -> None:
    pick = picker(seed, ranked)
    candidate = sub.sample(pick.rng)
    changed = sub.mutate(candidate, pick)
    assert changed != candidate or (sub.space.keys.hybrid is False and candidate.depth == sub.space.blocks)


def test_the_same_seed_draws_the_same_candidates() -> None:
    def drawn() -> list[Candidate]:
        pick, sub = picker(7, ranked=True), sub_spaces(space_of(KEYS))[0]
        first, second = sub.sample(pick.rng), sub.sample(pick.rng)
        return [first, second, sub.mutate(first, pick), sub.crossover(first, second, pick)]

    assert drawn() == drawn()


def test_a_child_of_equal_parents_is_their_equal() -> None:
    pick = picker(0, ranked=True)
    for sub in ALL:
        parent = sub.sample(pick.rng)
        assert sub.crossover(parent, parent, pick) == parent


@pytest.mark.parametrize("keys", [KEYS, SPACES[1]])
def test_parameters_are_those_of_the_transformers_model(keys: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    candidate = sub_spaces(space_of(keys))[0].sample(random.Random(3))
    config = candidate.config(LlamaConfig(**SMOLLM2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == candidate.parameters
    assert config.model_type == candidate.architecture and config.num_hidden_layers == candidate.depth
    if candidate.architecture == "lfm2":
        assert config.layer_types == candidate.shape_config()["layer_types"]


def test_the_layers_sources_and_order_leave_the_shape_alike() -> None:
    sub = sub_spaces(space_of(KEYS))[0]
    one = sub.largest()
    moved = Candidate.from_json({**one.to_json(), "layers": [[s + 1, o] for s, o in one.to_json()["layers"]]})
    turned = replace(one, layers=tuple(map(Layer, one.sources, one.operators[::-1])))
    for other in (moved, turned):
        assert one.shape_digest == other.shape_digest and one.digest != other.digest
    assert one.shape_digest != sub.smallest().shape_digest


def test_largest_and_smallest_bound_every_candidate() -> None:
    for sub in ALL:
        low, high = sub.smallest().parameters, sub.largest().parameters
        drawn = [sub.sample(random.Random(seed)) for seed in range(20)]
        assert all(low <= each.parameters <= high for each in drawn)


def test_sub_spaces_hold_what_their_bands_say() -> None:
    base, tiny = sub_spaces(space_of(SPACES[3]))
    assert base.smallest().parameters >= 70e6 and tiny.largest().parameters <= 40e6
    by_time = space_of({**KEYS, "sub_spaces": {"fast": {"decode_ms": [0, 3]}}})
    (fast,) = sub_spaces(by_time, lambda candidate: candidate.parameters / 20e9)
    assert fast.largest().parameters <= 60e6


def test_a_band_without_a_candidate_is_refused_by_name() -> None:
    with pytest.raises(LmdistillError, match="'giant' has no candidate"):
        sub_spaces(space_of({**KEYS, "sub_spaces": {"giant": {"parameters": [900, 901]}}}))


@pytest.mark.parametrize(
    ("keys", "format_name", "said"),
    [
        ({"hidden_sizes": [448]}, "q4_0", "448"),  # seven heads, three key heads
        ({"hidden_sizes": [600]}, "q4_0", "600"),
        ({"intermediate_sizes": [1000, 1024]}, "q4_0", "1000"),
        ({}, "q4_k_m", "hidden_size 576 is not whole blocks of q4_k_m"),
        ({"kv_heads": [2, 3]}, "q4_0", "kv_heads: no candidate can have 2"),
        ({"depth": [8, 31]}, "q4_0", "more than the teacher's 30"),
        ({"vocabularies": [50000]}, "q4_0", "50000"),
        ({"attention_at": [30]}, "q4_0", "no block 30"),
        ({"operators": ["attention"], "attention_layers": [1, 2]}, "q4_0", "every layer"),
        ({"depth": [4, 6], "attention_layers": [9, 12]}, "q4_0", "attention layers"),
        ({"sub_spaces": {"giant": {"parameters": [900, 901]}}}, "q4_0", "'giant' has no candidate: the nearest has"),
    ],
)
def test_a_space_that_cannot_ship_is_said_before_work(keys: dict[str, Any], format_name: str, said: str) -> None:
    found = problems(space_of(keys, format_name))
    assert any(said in what for what, _ in found), found


def test_a_space_of_multiples_of_256_ships_in_k_quants() -> None:
    space = Space(
        SpaceConfig(), {**SMOLLM2, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}, "q4_k_m"
    )
    assert problems(space) == [] and space.shapes()


@pytest.mark.parametrize(
    "keys", [{"operators": ["conv"]}, {"depth": [9, 3]}, {"widths": [3]}, {"sub_spaces": {"base": {}}}, {"kernels": []}]
)
def test_keys_that_contradict_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SpaceConfig(**keys)


@pytest.mark.parametrize("name", ["fast/small", "..", "a b", "", "klein\n"])
def test_a_sub_space_is_named_as_a_file_can_be(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot name a sub-space: take letters, digits, - and _"):
        SpaceConfig(sub_spaces={name: {"parameters": [1, 2]}})
    assert SpaceConfig(sub_spaces={"Fast-2_b": {"parameters": [1, 2]}}).sub_spaces


def test_a_teacher_without_the_sizes_that_are_read_is_a_problem_and_no_space() -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    space, ((what, _),) = open_space(SpaceConfig(**KEYS), gpt2, "q4_0")
    assert space is None and "cannot be grown from a teacher of type 'gpt2'" in what
    assert largest(DeviceSearchConfig(), gpt2) is None
    cut = {key: value for key, value in SMOLLM2.items() if key != "num_hidden_layers"}
    space, ((what, _),) = open_space(SpaceConfig(**KEYS), cut, "q4_0")
    assert space is None and "has no `num_hidden_layers`" in what


def test_damaged_json_is_no_candidate() -> None:
    good = ALL[0].largest().to_json()
    for bad in ({**good, "layers": [[0, "mamba"]]}, {"layers": []}, {**good, "more": 1}):
        with pytest.raises(IntegrityError):
            Candidate.from_json(bad)


def test_a_plan_foretells_the_largest_student_that_a_search_may_choose(tmp_path: Path) -> None:
    keys = SearchConfig(space=SpaceConfig(depth=(6, 9), attention_layers=(2, 6), intermediate_sizes=(512, 1536)))
    searched = Planned("student", "search", "student", "d" * 64, keys)
    after = Planned("distill", "distill", "model", "e" * 64, DistillConfig(tokens=1), {"student": [searched]})
    ctx = PreflightContext("next", DistillConfig(tokens=1), {"student": [after]}, None, tmp_path)
    space = Space(keys.space, SMOLLM2, "q4_0")
    largest = max(space.evenly(shape).parameters for shape in space.shapes())
    assert parameters_by(student_ahead(ctx, SMOLLM2)) == largest
