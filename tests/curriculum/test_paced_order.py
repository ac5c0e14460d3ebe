"""The order of a curriculum: a permutation, easy first, buckets opened when the pacing says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.curriculum.config import CurriculumConfig
from lmdistill.curriculum.order import buckets_of, openings, paced_order
from lmdistill.curriculum.pacing import open_share, pacings
from lmdistill.errors import RecipeError

CONFIGS = st.builds(
    CurriculumConfig,
    buckets=st.integers(2, 9),
    pacing=st.sampled_from(sorted(pacings())),
    start=st.floats(0, 0.9),
    until=st.floats(0.05, 1),
)
DIFFICULTIES = st.lists(st.floats(-5, 5, width=16), min_size=9, max_size=60).map(np.array)


def _plain(rows: int, epochs: float) -> Any:
    """As many rows as `epochs` have, each epoch a permutation."""
    wanted = max(1, int(rows * epochs))
    return np.concatenate([np.random.default_rng(i).permutation(rows) for i in range(4)])[:wanted]


@settings(max_examples=60, deadline=None)
@given(DIFFICULTIES, CONFIGS, st.floats(0.2, 3), st.integers(0, 5))
def test_every_row_comes_as_often_as_without_a_curriculum(
    difficulty_R: Any, config: CurriculumConfig, epochs: float, seed: int
) -> None:
    plain_N = _plain(len(difficulty_R), epochs)
    assert sorted(paced_order(plain_N, difficulty_R, config, seed)) == sorted(plain_N)


@settings(max_examples=60, deadline=None)
@given(DIFFICULTIES, CONFIGS, st.floats(0.2, 3), st.integers(0, 5))
def test_the_same_keys_and_seed_give_the_same_order(
    difficulty_R: Any, config: CurriculumConfig, epochs: float, seed: int
) -> None:
    plain_N = _plain(len(difficulty_R), epochs)
    first, second = (paced_order(plain_N, difficulty_R, config, seed) for _ in range(2))
    assert (first == second).all()


@settings(max_examples=60, deadline=None)
@given(DIFFICULTIES, CONFIGS, st.floats(0.2, 3))
def test_no_row_comes_before_its_bucket_is_open_unless_the_open_ones_are_empty(
    difficulty_R: Any, config: CurriculumConfig, epochs: float
) -> None:
    plain_N = _plain(len(difficulty_R), epochs)
    bucket_R = buckets_of(difficulty_R, config.buckets)
    opens_B = openings(bucket_R, config, len(plain_N))
    bucket_N = bucket_R[paced_order(plain_N, difficulty_R, config, 0)]
    for place, bucket in enumerate(bucket_N):
        if place < opens_B[bucket]:
            assert (bucket_N[place:] >= bucket).all()


@settings(max_examples=60, deadline=None)
@given(DIFFICULTIES, st.integers(2, 9))
def test_buckets_are_equal_parts_by_difficulty(difficulty_R: Any, buckets: int) -> None:
    bucket_R = buckets_of(difficulty_R, buckets)
    counts = np.bincount(bucket_R, minlength=buckets)
    assert counts.max() - counts.min() <= 1
    for bucket in range(buckets - 1):
        assert difficulty_R[bucket_R == bucket].max() <= difficulty_R[bucket_R == bucket + 1].min()


def test_linear_pacing_goes_from_bucket_to_bucket_and_shuffles_inside() -> None:
    difficulty_R = np.arange(800.0)
    order_N = paced_order(np.arange(800), difficulty_R, CurriculumConfig(), 0)
    buckets = np.split(order_N, 8)
    for number, bucket in enumerate(buckets):
        assert sorted(bucket) == list(range(100 * number, 100 * (number + 1)))
        assert list(bucket) != sorted(bucket)
    assert list(order_N) != list(paced_order(np.arange(800), difficulty_R, CurriculumConfig(), 1))


def test_once_all_buckets_are_open_the_rest_is_mixed() -> None:
    order_N = paced_order(np.arange(4000), np.arange(4000.0), CurriculumConfig(until=0.25), 0)
    assert order_N[:1000].mean() < 1400
    late = order_N[1000:].reshape(3, 1000).mean(1)
    assert np.ptp(late) < 120


@pytest.mark.parametrize("name", pacings())
def test_a_pacing_rises_from_its_start_to_all_rows(name: str) -> None:
    config = CurriculumConfig(pacing=name, start=0.2, until=0.8)
    shares = [open_share(config, at) for at in np.linspace(0, 1, 21)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.2) and all(share == 1 for share in shares[16:])


def test_root_is_ahead_of_linear_and_quadratic_behind() -> None:
    shares = {name: open_share(CurriculumConfig(pacing=name), 0.5) for name in pacings()}
    assert shares["root"] > shares["linear"] == 0.5 > shares["quadratic"] > shares["step"] == 0


def test_an_unknown_pacing_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'linear'"):
        open_share(CurriculumConfig(pacing="linea"), 0.1)
