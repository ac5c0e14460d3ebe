"""Layer maps: which pairs the named ones stand for, how layers are counted, and what is said where none is possible."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdistill.errors import PreflightError
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.layer_maps import Depths, pairs

PLAN = ("full", "gone", "local", "gone", "gone", "full", "gone")
GROWN = Depths(3, 7, (1, 3), PLAN)


def _pairs(layers: Any, reads: str = "hidden", depths: Depths = GROWN) -> list[tuple[int, int]]:
    return pairs(IntermediateKeys(loss="hidden_mse", layers=layers), reads, depths)


def test_a_grown_block_learns_the_state_where_the_next_kept_block_begins() -> None:
    assert _pairs("grown") == [(1, 2), (2, 5), (3, 7)]
    assert _pairs("grown", "block") == [(1, 2), (2, 5), (3, 7)]


def test_relations_of_a_grown_block_are_those_of_the_block_whose_attention_it_kept() -> None:
    assert _pairs("grown", "relations") == [(1, 1), (3, 6)]


def test_last_is_the_last_state_or_the_last_block_that_attends() -> None:
    assert _pairs("last") == [(3, 7)]
    assert _pairs("last", "relations", Depths(3, 7, (1, 2))) == [(2, 7)]


@given(st.integers(1, 40), st.integers(1, 80))
def test_uniform_maps_go_up_evenly_from_the_first_to_the_last(student: int, teacher: int) -> None:
    found = _pairs("uniform", "hidden", Depths(student, teacher))
    assert [ours for ours, _ in found] == list(range(1, student + 1))
    theirs = [layer for _, layer in found]
    assert theirs[-1] == teacher and theirs == sorted(theirs) and min(theirs) >= 1
    assert all(abs(layer - ours * teacher / student) <= 0.5 or layer == 1 for ours, layer in found)


def test_negative_layers_count_from_the_end() -> None:
    assert _pairs({-1: -1, 0: 0, -3: -6}) == [(0, 0), (1, 2), (3, 7)]
    assert _pairs({-1: -1}, "relations") == [(3, 7)]


@pytest.mark.parametrize("layers", ["last", "uniform", {1: -1}])
def test_what_counts_from_the_end_of_an_unknown_teacher_is_refused(layers: Any) -> None:
    with pytest.raises(PreflightError, match="its depth is not known"):
        _pairs(layers, depths=Depths(3, None))
    assert _pairs({1: 30}, depths=Depths(3, None)) == [(1, 30)]


@pytest.mark.parametrize("layers", [{2: 3}, {1: 1, 2: 2}])
def test_relations_of_a_convolution_are_refused_with_the_blocks_that_attend(layers: Any) -> None:
    with pytest.raises(PreflightError, match="blocks 2 have no attention") as refused:
        _pairs(layers, "relations")
    assert "1, 3" in refused.value.fix
