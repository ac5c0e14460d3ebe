"""The latency model: it finds a device's paces, bears drift, and says how sure it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.search_shapes import known_profile, known_seconds, toy_space, toy_whole

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.search.design import spread_out
from lmdistill.search.latency import LatencyModel
from lmdistill.search.profile import DECODE, Profile, prefill_task
from lmdistill.search.sub_space import SubSpace, whole

SUB = toy_whole()
FITTED = spread_out(SUB, 30, 0)


def worst(model: LatencyModel, profile: Profile, sub: SubSpace) -> float:
    """The largest relative error of decode and first token over random candidates of the sub-space."""
    errors = []
    for seed in range(30):
        candidate = sub.sample(random.Random(1000 + seed))
        decode = known_seconds(candidate, DECODE, profile.plan) / profile.plan.decode
        errors.append(abs(model.decode_seconds(candidate) / decode - 1))
        for tokens in profile.plan.prompts:
            prefill = known_seconds(candidate, prefill_task(tokens), profile.plan)
            errors.append(abs(model.ttft_seconds(candidate, tokens) / prefill - 1))
    return max(errors)


def test_held_out_candidates_are_foretold_exactly_where_nothing_is_noisy() -> None:
    profile = known_profile(FITTED, SUB.largest())
    assert worst(LatencyModel.fit(profile), profile, SUB) < 1e-6


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(0.5, 4.0), min_size=9, max_size=9))
def test_a_device_that_slows_down_between_groups_changes_only_the_common_pace(slow: list[float]) -> None:
    steady = known_profile(FITTED, SUB.largest())
    drifting = known_profile(FITTED, SUB.largest(), slowdown=lambda group: slow[group])
    one, other = LatencyModel.fit(steady), LatencyModel.fit(drifting)
    ratios = [other.decode_seconds(each) / one.decode_seconds(each) for each in FITTED]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_intervals_hold_what_they_promise_under_noise() -> None:
    within = total = 0
    for seed in range(6):
        profile = known_profile(FITTED, SUB.largest(), noise=0.05, seed=seed)
        model = LatencyModel.fit(profile)
        for draw in range(40):
            candidate = SUB.sample(random.Random(draw))
            interval = model.predict(candidate).decode_tps
            truth = profile.plan.decode / known_seconds(candidate, DECODE, profile.plan)
            assert interval.low <= interval.value <= interval.high
            within += interval.low <= truth <= interval.high
            total += 1
    assert within / total >= 0.85


def test_memory_and_file_are_foretold_too() -> None:
    model = LatencyModel.fit(known_profile(FITTED, SUB.largest()))
    for seed in range(10):
        candidate = SUB.sample(random.Random(seed))
        figures = model.predict(candidate).figures
        assert figures["file_mb"] == pytest.approx((2e6 + 0.5625 * candidate.parameters) / 1e6, rel=1e-3)
        assert figures["ram_mb"] == pytest.approx((60e6 + 1.1 * candidate.parameters) / 1e6, rel=1e-3)
        assert figures["ttft_ms"] == figures["ttft_ms@512"] < figures["ttft_ms@1024"]


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = known_profile(FITTED, SUB.largest(), noise=0.1)
    (tmp_path / "p.json").write_text(json.dumps(profile.to_json()))
    read = Profile.read(tmp_path / "p.json")
    assert read == profile
    assert LatencyModel.fit(read) == LatencyModel.fit(profile)


def test_a_few_measurements_are_too_few() -> None:
    with pytest.raises(LmdistillError, match="11 timed candidates"):
        LatencyModel.fit(known_profile(FITTED[:11], SUB.largest()))


@pytest.mark.parametrize(
    ("text", "said"), [("{", "no device profile"), ("[]", "no device profile"), ('{"version": 9}', "has no 'plan'")]
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(IntegrityError, match=said):
        Profile.read(tmp_path / "p.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["plan"].pop("prompts"),
        lambda data: data["plan"].update(colour="blue"),
        lambda data: data["measured"][3].pop("seconds"),
        lambda data: data["measured"][3]["seconds"].pop(DECODE),
        lambda data: data["measured"][3]["reference"][DECODE].pop(),
        lambda data: data["measured"][3]["reference"].update({DECODE: [0.0] * 5}),
        lambda data: data["measured"][3]["candidate"].pop("heads"),
        lambda data: data.update(measured=[1]),
    ],
)
def test_a_profile_damaged_on_its_way_is_refused(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    data = known_profile(FITTED, SUB.largest()).to_json()
    spoil(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=r"p\.json is a damaged device profile"):
        Profile.read(tmp_path / "p.json")


def test_a_profile_of_another_version_is_refused(tmp_path: Path) -> None:
    data = known_profile([], SUB.largest()).to_json()
    (tmp_path / "p.json").write_text(json.dumps({**data, "version": 9}))
    with pytest.raises(IntegrityError, match="version 9, not 1"):
        Profile.read(tmp_path / "p.json")


def test_shapes_that_do_equal_work_are_timed_where_there_are_no_others() -> None:
    kernels = whole(toy_space(kernels=[2, 3], hidden_sizes=None, intermediate_sizes=None, kv_heads=None))
    shapes = len(list(kernels.one_of_each_shape()))
    found = spread_out(kernels, shapes, 0)
    assert len({candidate.shape_digest for candidate in found}) == len(found) == shapes


def test_timed_shapes_are_unlike_each_other_and_hold_the_extremes() -> None:
    digests = {each.shape_digest for each in FITTED}
    assert len(digests) == len(FITTED) == 30
    assert SUB.largest().shape_digest in digests and SUB.smallest().shape_digest in digests
    assert [each.digest for each in spread_out(SUB, 30, 0)] == [each.digest for each in FITTED]
