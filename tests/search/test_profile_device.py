"""`lmdistill profile-device`: from a recipe to a request, and to a profile of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmdistill.cli import app
from lmdistill.errors import PreflightError, RecipeError
from lmdistill.search import device
from lmdistill.search.profile import Measured, Profile, Request

STAGE = '''
"""A stage that searches in name only."""
from lmdistill.pipeline.stage import Stage
from lmdistill.search.keys import DeviceSearchConfig


class Searching(Stage[DeviceSearchConfig]):
    """Searches nothing."""

    name = "searching"
    version = 1
    Config = DeviceSearchConfig
    inputs = ()
    output = "student"
'''
RECIPE = """
name: toy
teacher: {teacher}
stages:
  - stage: searching
    space: {{depth: [2, 4], hidden_sizes: [32, 64], intermediate_sizes: [64, 128]}}
    timing: {{candidates: 12, prompts: [16], decode: 4, rounds: 1, threads: 1}}
"""


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_llama: Callable[..., Path]) -> Path:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "searching.py").write_text(STAGE)
    monkeypatch.setenv("LMDISTILL_STAGES", str(tmp_path / "stages"))
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text(RECIPE.format(teacher=toy_llama(num_attention_heads=2, num_key_value_heads=1)))
    return tmp_path / "r.yaml"


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["profile-device", *arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_a_request_is_written_with_how_to_run_it(recipe: Path, tmp_path: Path) -> None:
    shown = run(str(recipe), "--request", str(tmp_path / "pi"))
    assert "python profile_device.pyz profile_request.json" in shown
    asked = Request.read(tmp_path / "pi" / "profile_request.json")
    assert asked.plan.prompts == (16,) and len(asked.candidates) == 13  # the teacher among them


def test_this_machine_is_timed_into_a_profile(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(request: Request, result: Path, work: Path, report: Callable[[int, int], None]) -> Profile:
        profile = Profile(request.plan, request.reference, {"machine": "toy", "processor": ""})
        one = {task: [1.0] for task in request.plan.tasks}
        profile.add(Measured(each, one, one, 7, 7) for each in request.candidates)
        result.write_text(json.dumps(profile.to_json()))
        return profile

    monkeypatch.setattr(device, "run", timed)
    out = ("--out", str(tmp_path / "here.json"))
    shown = run(str(recipe), *out)
    assert "13 shapes on toy" in shown and "decode: nine of ten" in shown
    assert len(Profile.read(tmp_path / "here.json").measured) == 13
    recipe.write_text(recipe.read_text() + "    budgets: [decode_tps >= 2]\n")
    assert "decode_tps >= 2: some student of the space is foretold to keep that" in run(str(recipe), *out)
    with pytest.raises(PreflightError, match="no candidate of the space keeps the budgets 'decode_tps >= 9000'"):
        run(str(recipe), *out, "--set", "stages.searching.budgets=[decode_tps >= 9000]")


def test_a_recipe_that_does_not_search_or_cannot_is_refused(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(text.replace("depth: [2, 4]", "depth: [2, 9]"))
    with pytest.raises(PreflightError, match="more than the teacher's 4"):
        run(str(recipe))
    recipe.write_text(text[: text.index("teacher:")] + text[text.index("stages:") :])
    with pytest.raises(RecipeError, match="no teacher"):
        run(str(recipe))
    with pytest.raises(RecipeError, match="no search stage"):
        run("lfm_qad")
