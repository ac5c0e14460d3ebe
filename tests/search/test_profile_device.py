"""`lmdistill profile-device`: from a recipe to a request, and to a profile of this machine."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmdistill.cli import app
from lmdistill.errors import LmdistillError, PreflightError, RecipeError
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


@pytest.fixture
def toy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a second here."""

    def timed(request: Request, result: Path, work: Path, report: Callable[[int, int], None]) -> Profile:
        assert work.is_dir() and not list(work.iterdir())
        profile = Profile(request.plan, request.reference, device.describe())
        one = {task: [1.0] for task in request.plan.tasks}
        profile.add(Measured(each, one, one, 7, 7) for each in request.candidates)
        result.write_text(json.dumps(profile.to_json()))
        return profile

    monkeypatch.setattr(device, "describe", lambda: {"machine": "toy", "processor": ""})
    monkeypatch.setattr(device, "run", timed)


def test_this_machine_is_timed_into_a_profile(recipe: Path, tmp_path: Path, toy_machine: None) -> None:
    out = ("--out", str(tmp_path / "here.json"))
    shown = run(str(recipe), *out)
    assert "13 shapes on toy" in shown and "decode: nine of ten" in shown
    assert len(Profile.read(tmp_path / "here.json").measured) == 13
    recipe.write_text(recipe.read_text() + "    budgets: [decode_tps >= 2]\n")
    assert "decode_tps >= 2: some student of the space is foretold to keep that" in run(str(recipe), *out)
    with pytest.raises(PreflightError, match="no candidate of the space keeps the budgets 'decode_tps >= 9000'"):
        run(str(recipe), *out, "--set", "stages.searching.budgets=[decode_tps >= 9000]")


def test_nothing_but_the_profile_is_written_and_no_folder_is_taken_for_it(
    recipe: Path, tmp_path: Path, toy_machine: None
) -> None:
    keep = tmp_path / ".here" / "key"
    keep.parent.mkdir()
    keep.write_text("mine")
    before = set(tmp_path.rglob("*"))
    run(str(recipe), "--out", str(tmp_path / "here.json"))
    assert keep.read_text() == "mine"
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"here.json", "cache"}
    with pytest.raises(LmdistillError, match="is a folder") as error:
        run(str(recipe), "--out", str(tmp_path))
    assert error.value.exit_code == 2


def test_another_devices_profile_is_not_written_over(recipe: Path, tmp_path: Path, toy_machine: None) -> None:
    out = tmp_path / "device_profile.json"
    run(str(recipe), "--out", str(out))
    theirs = out.read_text().replace('"toy"', '"aarch64"')
    out.write_text(theirs)
    with pytest.raises(PreflightError, match="its device has machine aarch64, this one toy"):
        run(str(recipe), "--out", str(out))
    assert out.read_text() == theirs


def test_packages_that_timing_needs_are_looked_for_and_a_request_needs_none(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    gone = ("llama_cpp", "gguf", "scipy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else there(name, *more))
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PreflightError, match="profile-device needs the package llama_cpp"):
        run(str(recipe), "--out", str(tmp_path / "here.json"))
    assert "profile_request.json" in run(str(recipe), "--request", str(tmp_path / "pi"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "gpt2", "num_hidden_layers": None}, "cannot be grown from a teacher of type 'gpt2'"),
        ({"tie_word_embeddings": False}, "head is not tied"),
    ],
)
def test_a_teacher_that_the_stage_refuses_is_not_timed(
    recipe: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    """By its config.json alone."""
    folder = tmp_path / "teacher"
    shutil.copytree(re.findall("teacher: (.*)", recipe.read_text())[0], folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    recipe.write_text(re.sub("teacher: .*", f"teacher: {folder}", recipe.read_text()))
    for more in ([], ["--request", str(tmp_path / "pi")]):
        with pytest.raises(PreflightError, match=what):
            run(str(recipe), *more)


def test_a_space_that_tells_no_paces_or_has_an_empty_band_is_not_timed(recipe: Path) -> None:
    text = recipe.read_text()
    narrow = text.replace("depth: [2, 4], hidden_sizes: [32, 64], intermediate_sizes: [64, 128]", "depth: [4, 4]")
    recipe.write_text(narrow)
    with pytest.raises(PreflightError, match="too few shapes"):
        run(str(recipe))
    band = "sub_spaces: {giant: {parameters: [900, 901]}}, depth: [2, 4]"
    recipe.write_text(text.replace("depth: [2, 4]", band))
    with pytest.raises(PreflightError, match="'giant' has no candidate"):
        run(str(recipe))


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
