"""What a right recipe becomes: defaults, extends, --set, wiring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmdistill.errors import RecipeError
from lmdistill.recipe import Recipe, load_recipe, shipped_recipes

Write = Callable[..., Path]


def inputs_of(recipe: Recipe) -> dict[str, dict[str, tuple[str, ...]]]:
    return {entry.name: dict(entry.inputs) for entry in recipe.entries}


def test_defaults_and_wiring(write: Write) -> None:
    recipe = load_recipe(write())
    assert recipe.name == "toy"
    assert recipe.entry("gather").config.model_dump()["repeat"] == 1
    assert inputs_of(recipe) == {
        "gather": {},
        "learn": {"corpus": ("gather",), "start": ()},
        "again": {"corpus": ("gather",), "start": ("learn",)},
        "summary": {"everything": ("gather", "learn", "again")},
    }


def test_newest_fitting_artefact_is_taken(write: Write) -> None:
    text = "stages:\n- stage: gather\n- {stage: gather, name: second}\n- stage: learn\n"
    text += "- {stage: learn, name: other, from: gather}\n"
    wired = inputs_of(load_recipe(write(text)))
    assert wired["learn"]["corpus"] == ("second",)
    assert wired["other"] == {"corpus": ("gather",), "start": ("learn",)}


def test_list_in_from_is_matched_by_kind(write: Write) -> None:
    text = "stages:\n- stage: gather\n- stage: learn\n- {stage: learn, name: b}\n"
    text += "- {stage: learn, name: c, from: [learn, gather]}\n"
    assert inputs_of(load_recipe(write(text)))["c"] == {"corpus": ("gather",), "start": ("learn",)}


def test_teacher_can_be_named_in_from(write: Write) -> None:
    text = "teacher: some/folder\nstages:\n- stage: gather\n- {stage: learn, from: teacher}\n"
    assert inputs_of(load_recipe(write(text)))["learn"] == {"corpus": ("gather",), "start": ("teacher",)}


def test_teacher_is_not_taken_unasked(write: Write) -> None:
    text = "teacher: some/folder\nstages:\n- stage: gather\n- stage: learn\n- stage: summary\n"
    wired = inputs_of(load_recipe(write(text)))
    assert wired["learn"]["start"] == ()
    assert wired["summary"]["everything"] == ("gather", "learn")


def test_extends_merges_stages_by_name_and_appends(write: Write) -> None:
    write(name="base.yaml")
    child = "extends: base.yaml\nruntime: {threads: 2}\nstages:\n"
    child += "  - name: learn\n    steps: 9\n  - stage: gather\n    name: more\n"
    recipe = load_recipe(write(child, "child.yaml"))
    assert recipe.name == "child"
    assert recipe.runtime.threads == 2
    assert [entry.name for entry in recipe.entries] == ["gather", "learn", "again", "summary", "more"]
    assert recipe.entry("learn").config.model_dump()["steps"] == 9
    assert recipe.entry("gather").config.model_dump()["text"] == "hello"


def test_extends_replaces_an_asset_whole(write: Write) -> None:
    digest = "0" * 64
    write(f"teacher: {{source: a, sha256: '{digest}'}}\nstages:\n- stage: gather\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nteacher: {source: b}\n", "child.yaml"))
    assert recipe.teacher is not None
    assert (recipe.teacher.source, recipe.teacher.sha256) == ("b", None)


def test_extends_problem_names_the_file_it_is_in(write: Write) -> None:
    write("stages:\n- stage: gather\n  repaet: 1\n", "base.yaml")
    with pytest.raises(RecipeError, match=r"base\.yaml:3: stages\.gather\.repaet"):
        load_recipe(write("extends: base.yaml\n", "child.yaml"))


def test_extends_a_recipe_in_another_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write()
    recipe = load_recipe(write("extends: ../toy.yaml\n", "sub/child.yaml"))
    assert len(recipe.entries) == 4


def test_set_addresses_stages_by_name_and_reads_yaml(write: Write) -> None:
    changes = [
        "stages.again.steps=7",
        "stages.gather.parts=[{weight: 5e-4}]",
        "runtime.threads=3",
        "teacher=a/b",
        "name=x",
    ]
    recipe = load_recipe(write(), changes)
    assert recipe.entry("again").config.model_dump()["steps"] == 7
    assert recipe.entry("learn").config.model_dump()["steps"] == 4
    assert recipe.entry("gather").config.model_dump()["parts"] == [{"weight": 0.0005, "batch": 8}]
    assert recipe.runtime.threads == 3
    assert recipe.teacher is not None
    assert recipe.teacher.source == "a/b"
    assert recipe.name == "x"


def test_set_reaches_into_lists_and_bare_assets(write: Write) -> None:
    text = "stages:\n- stage: gather\n  data: a.txt\n  parts: [{weight: 1}, {weight: 2}]\n"
    digest = "a" * 64
    recipe = load_recipe(write(text), ["stages.gather.parts.1.weight=3", f"stages.gather.data.sha256={digest}"])
    config = recipe.entry("gather").config.model_dump()
    assert [part["weight"] for part in config["parts"]] == [1, 3]
    assert config["data"] == {"source": "a.txt", "sha256": digest}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.lern.steps=1", r"stages\.lern: no stage 'lern' here; did you mean 'learn'\? stages: gather, learn"),
        (
            "stages.learn.stepz=1",
            r"--set stages\.learn\.stepz=1: stages\.learn\.stepz: unknown key; did you mean 'steps'",
        ),
        (
            "stages.learn.steps=many",
            r"--set stages\.learn\.steps=many: stages\.learn\.steps: input should be a valid int",
        ),
        ("stages.learn.steps", r"is not key=value"),
        ("stages.learn.steps.a=1", r"cannot be set: stages\.learn\.steps is the value 4"),
        ("stages.learn.steps=[1", r"not valid YAML"),
        ("extends=other.yaml", r"change the file instead"),
        ("tacher=x", r"tacher: unknown key; did you mean 'teacher'"),
    ],
)
def test_bad_set_is_explained(change: str, message: str, write: Write) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(), [change])


def test_shipped_recipe_is_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write) -> None:
    (tmp_path / "packed").mkdir()
    write(name="packed/shipped_toy.yaml")
    monkeypatch.setattr("lmdistill.recipe.shipped.shipped_folder", lambda: tmp_path / "packed")
    assert list(shipped_recipes()) == ["shipped_toy"]
    for reference in ("shipped_toy", "shipped_toy.yaml", "recipes/shipped_toy.yaml"):
        assert load_recipe(reference).name == "toy"
