"""What a profile's file tells of a search before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys.search_shapes import known_profile, toy_space, toy_whole

from lmdistill.search.config import SearchConfig
from lmdistill.search.design import spread_out
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.profile_checks import profile_problems
from lmdistill.search.sub_space import whole


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "pi.json"
    path.write_text(json.dumps(known_profile(spread_out(toy_whole(), 20, 0), toy_whole().largest()).to_json()))
    return str(path)


NARROW: dict[str, Any] = {
    "depth": [2, 3],
    "attention_layers": [1, 2],
    **dict.fromkeys(("hidden_sizes", "intermediate_sizes", "kv_heads", "vocabularies")),
    "kernels": [3],
}


def said(**keys: Any) -> list[str]:
    space = toy_space(**keys.get("space", {}))
    return [problem.render() for problem in profile_problems(DeviceSearchConfig(**keys), space)]


def test_a_search_that_can_work_has_no_problem(profile: str) -> None:
    assert said() == []
    assert said(device=profile, budgets=["file_mb <= 100", "decode >= 1x teacher"]) == []


def test_budgets_that_no_student_can_keep_are_said_from_the_profile(profile: str) -> None:
    (text,) = said(device=profile, budgets=["decode >= 900x teacher"])
    assert "no candidate" in text and "the nearest point is decode_tps" in text


def test_a_missing_or_foreign_profile_is_said(profile: str, tmp_path: Path) -> None:
    (text,) = said(device=str(tmp_path / "none.json"))
    assert "there is no device profile" in text and "profile-device" in text
    (text,) = said(device=profile, timing={"format": "q8_0"})
    assert "in q4_0, timing.format is q8_0" in text
    (text,) = said(device=profile, timing={"prompts": [512, 4096]}, budgets=["ttft_ms@4096 <= 9"])
    assert "the profile has prompts of 512, 1024 tokens" in text


def test_a_profile_of_another_shortest_prompt_judges_no_plain_ttft(profile: str) -> None:
    (text,) = said(device=profile, timing={"prompts": [128]}, budgets=["ttft <= 9x teacher", "file_mb <= 100"])
    assert "'ttft <= 9x teacher': the profile's shortest prompt has 512 tokens, that of timing.prompts 128" in text
    assert "set timing.prompts to [512]" in text
    assert said(device=profile, timing={"prompts": [128]}, budgets=["file_mb <= 100"]) == []
    assert said(device=profile, timing={"prompts": [128, 512]}, budgets=["ttft@512 <= 9x teacher"]) == []
    searching = SearchConfig(device=profile, timing={"prompts": [128]}, objectives=["decode_ms", "ttft_ms"])
    (error,) = profile_problems(searching, toy_space())
    assert "the objective ttft_ms: the profile's shortest prompt has 512" in error.what


def test_a_profile_of_students_that_do_other_work_is_refused(tmp_path: Path) -> None:
    """Convolutions that were never timed would cost nothing, and be chosen for it."""
    path, attending = tmp_path / "llama.json", whole(toy_space(operators=["attention"], attention_layers=None))
    path.write_text(json.dumps(known_profile(spread_out(attending, 20, 0), attending.largest()).to_json()))
    (text,) = said(device=str(path))
    assert "timed 0 layers of convolution at most, candidates have up to 5" in text and "profile-device" in text
    assert said(device=str(path), space={"operators": ["attention"], "attention_layers": None}) == []


def test_a_space_with_too_few_shapes_to_time_here_is_said() -> None:
    (text,) = said(space=NARROW)
    assert "too few shapes: 4" in text and "at least 12 unlike shapes" in text
