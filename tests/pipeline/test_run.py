"""A run: artefacts, caching, ranges, force, events, what is written beside the artefacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys.fixtures import manifests, teacher_folder

from lmdistill.errors import IntegrityError, LmdistillError, PreflightError
from lmdistill.pipeline.events import read_events
from lmdistill.pipeline.plan import Selection, make_plan
from lmdistill.pipeline.run import run_pipeline
from lmdistill.pipeline.stage import Artefact
from lmdistill.recipe import load_recipe

Write = Callable[..., Path]
RUN = Path("runs/toy")


def go(recipe: Path, *changes: str, **selection: Any) -> dict[str, Artefact]:
    return run_pipeline(make_plan(load_recipe(recipe, changes), RUN, Selection(**selection)))


def states(recipe: Path, *changes: str, **selection: Any) -> dict[str, str]:
    plan = make_plan(load_recipe(recipe, changes), RUN, Selection(**selection))
    return {step.name: step.state for step in plan.steps}


def events(name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(RUN / "events.jsonl") if event["event"] == name]


def test_half_an_event_spoils_no_other(write: Write) -> None:
    """A power cut leaves half a line, even half a letter; the events before and after it are read."""
    recipe = write("stages:\n- stage: gather\n")
    go(recipe)
    before = read_events(RUN / "events.jsonl")
    with (RUN / "events.jsonl").open("ab") as file:
        file.write('{"time": "2026", "event": "note", "text": "é'.encode()[:-1])
    assert read_events(RUN / "events.jsonl") == before
    go(recipe)
    after = read_events(RUN / "events.jsonl")
    assert after[: len(before)] == before
    assert [event["event"] for event in after[len(before) :]] == ["run_started", "stage_cached", "run_finished"]


def test_artefacts_and_their_records(write: Write) -> None:
    made = go(write())
    assert list(made) == ["gather", "learn", "again", "summary"]
    gather = made["gather"]
    assert (gather.out / "text.txt").read_text() == "hello"
    assert gather.metrics == {"tokens": 5}
    assert gather.path.name == f"01-gather-{gather.fingerprint[:12]}"
    assert {file.name for file in gather.path.iterdir()} == {
        "key.json",
        "made_from.json",
        "manifest.json",
        "run.json",
        "out",
    }
    run = json.loads((gather.path / "run.json").read_text())
    assert (run["tokens"], run["resumed"]) == (5, False)
    assert run["seconds"] > 0
    rows = json.loads((made["summary"].out / "report.json").read_text())
    assert [row["name"] for row in rows] == ["gather", "learn", "again"]
    assert "printed by the stage" in (RUN / "logs/01-gather.log").read_text()
    assert json.loads((RUN / "environment.json").read_text())["packages"]["pydantic"] != "absent"
    assert not list(RUN.glob(".partial-*"))


def test_events_tell_the_run(write: Write) -> None:
    go(write())
    assert [event["stage"] for event in events("stage_finished")] == ["gather", "learn", "again", "summary"]
    progress = events("progress")[0]
    assert (progress["stage"], progress["done"], progress["total"], progress["unit"]) == ("gather", 1, 1, "texts")
    assert progress["figures"] == {"loss": 0.5}
    assert events("note")[0]["text"] == "gathered"
    assert events("run_started")[0]["stages"] == ["gather", "learn", "again", "summary"]
    assert all("time" in event for event in read_events(RUN / "events.jsonl"))
    go(Path("toy.yaml"))
    assert [event["stage"] for event in events("stage_cached")] == ["gather", "learn", "again", "summary"]
    assert events("run_finished")[-1]["ran"] == []


def test_lock_file_plans_the_same_run(write: Write) -> None:
    made = go(write(), "stages.again.steps=3")
    lock = load_recipe(RUN / "recipe.lock.yaml")
    again = make_plan(lock, RUN)
    assert {step.name: step.planned.fingerprint for step in again.steps} == {
        name: artefact.fingerprint for name, artefact in made.items()
    }


def test_only_what_changed_runs_again(write: Write) -> None:
    go(write())
    assert set(states(Path("toy.yaml")).values()) == {"cached"}
    changed = states(Path("toy.yaml"), "stages.again.steps=9")
    assert changed == {"gather": "cached", "learn": "cached", "again": "run", "summary": "run"}
    assert set(states(Path("toy.yaml"), "stages.learn.pause=0.001", "runtime.threads=1").values()) == {"cached"}


def test_renamed_and_moved_stages_find_their_work(write: Write) -> None:
    go(write())
    text = "name: toy\nstages:\n- {stage: gather, text: other}\n- {stage: gather, name: new, text: hello}\n"
    text += "- {stage: learn, name: fresh, steps: 4}\n"
    assert states(write(text)) == {"gather": "run", "new": "cached", "fresh": "cached"}


def test_two_equal_stages_share_one_artefact(write: Write) -> None:
    made = go(write("stages:\n- stage: gather\n- {stage: gather, name: twin}\n"))
    assert made["gather"].path == made["twin"].path
    assert made["twin"].name == "twin"


def test_until_from_only(write: Write) -> None:
    recipe = write()
    assert list(go(recipe, last="learn")) == ["gather", "learn"]
    with pytest.raises(PreflightError, match="stage 'summary' needs the result of 'again', which is not there"):
        go(recipe, only="summary")
    go(recipe, only="again")
    assert states(recipe, first="summary") == {
        "gather": "cached",
        "learn": "cached",
        "again": "cached",
        "summary": "run",
    }
    go(recipe, first="summary")
    assert set(states(recipe).values()) == {"cached"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"first": "lern"}, "--from lern: the recipe has no stage of this name; did you mean 'learn'"),
        ({"first": "again", "last": "gather"}, "--from again comes after --until gather"),
        ({"only": "learn", "last": "learn"}, "--only does not go with"),
        ({"force": ("x",)}, "--force x: the recipe has no stage"),
    ],
)
def test_bad_ranges_are_explained(selection: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(LmdistillError, match=message):
        go(write(), **selection)


def test_force_makes_a_stage_again(write: Write) -> None:
    recipe = write()
    go(recipe)
    before, text = manifests(RUN), next(RUN.glob("02-learn-*")) / "run.json"
    stamp = text.stat().st_mtime_ns
    go(recipe, force=("learn",))
    assert manifests(RUN) == before
    assert text.stat().st_mtime_ns > stamp
    assert not list(RUN.glob(".replaced-*"))
    assert not any("other bytes" in event["text"] for event in events("note"))


def test_a_forced_run_that_fails_gives_the_old_artefact_back(write: Write) -> None:
    recipe = write()
    go(recipe)
    before = manifests(RUN)
    with pytest.raises(LmdistillError, match="no such luck"):
        go(recipe, "stages.learn.fail=value", force=("learn",))
    assert manifests(RUN) == before
    assert not [*RUN.glob(".replaced-*"), *RUN.glob(".partial-*")]
    assert set(states(recipe).values()) == {"cached"}


@pytest.mark.parametrize("finished", [False, True])
def test_a_killed_forced_run_is_undone_at_the_next_start(finished: bool, write: Write) -> None:
    """Killed before the new artefact was there, the old one comes back; after it, the old one goes."""
    recipe = write()
    go(recipe)
    before, folder = manifests(RUN), next(RUN.glob("02-learn-*"))
    aside = folder.with_name(f".replaced-{folder.name}")
    shutil.copytree(folder, aside)
    if not finished:
        folder.rename(folder.with_name(f".partial-learn-{folder.name.rsplit('-', 1)[1]}"))
        (aside / "mark").touch()
    go(recipe)
    assert manifests(RUN) == before
    assert (folder / "mark").exists() is not finished
    assert not [*RUN.glob(".replaced-*"), *RUN.glob(".partial-*")]
    assert len(events("stage_started")) == 4, "nothing was made again"


def test_force_says_when_the_bytes_differ(write: Write) -> None:
    recipe = write("stages:\n- stage: gather\n")
    folder = go(recipe)["gather"].path
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"metrics": {"tokens": 99}}))
    go(recipe, force=("gather",))
    assert any("other bytes than before" in event["text"] for event in events("note"))


def test_teacher_reaches_stages_and_fingerprints(write: Write, toys: Path) -> None:
    folder = teacher_folder(toys)
    text = "teacher: teacher\nstages:\n- stage: gather\n- {stage: learn, from: teacher, with_teacher: true}\n"
    recipe = write(text)
    made = go(recipe)
    assert (made["learn"].out / "teacher.txt").read_text() == (folder / "config.json").read_text()
    assert made["teacher"].model().path.resolve() == folder.resolve()
    assert set(states(recipe).values()) == {"cached"}
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert states(recipe) == {"gather": "cached", "learn": "run"}


def test_missing_local_files_are_all_named_before_the_start(write: Write) -> None:
    text = "teacher: no/such\nstages:\n- {stage: gather, data: none.txt}\n- {stage: learn, with_teacher: true}\n"
    with pytest.raises(PreflightError) as caught:
        go(write(text))
    assert "2 things stand in the way" in caught.value.render()
    assert "no/such" in caught.value.render()
    assert "none.txt" in caught.value.render()


@pytest.mark.parametrize("text", ["hellp", "hell"])
def test_damage_is_found_and_named_and_cured_as_the_message_says(text: str, write: Write) -> None:
    recipe = write()
    file = go(recipe, last="gather")["gather"].out / "text.txt"
    before = manifests(RUN)
    file.write_text(text)
    with pytest.raises(IntegrityError) as caught:
        go(recipe)
    assert str(file) in caught.value.what
    assert f"delete {file} and give the same command" in caught.value.fix
    assert not list(RUN.glob("*learn*"))
    file.unlink()
    go(recipe, last="gather")
    assert manifests(RUN) == before


def test_only_the_missing_part_is_made_again(write: Write) -> None:
    recipe = write()
    made = go(recipe)
    before = manifests(RUN)
    files = sorted((made["learn"].out / "model").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    assert states(recipe) == {"gather": "cached", "learn": "resume", "again": "cached", "summary": "cached"}
    assert not list(RUN.glob(".partial-*")), "a plan changes nothing"
    go(recipe)
    changed = [file.name for file, time in zip(files, times, strict=True) if file.stat().st_mtime_ns != time]
    assert changed == [files[2].name]
    assert manifests(RUN) == before
    assert not [event for event in events("note") if "other bytes" in event["text"]]


@pytest.mark.parametrize("name", ["manifest.json", "key.json"])
def test_damage_that_is_cured_by_deleting_the_folder(name: str, write: Write) -> None:
    recipe = write()
    made = go(recipe)
    before = manifests(RUN)
    (made["gather"].path / name).write_text("{")
    with pytest.raises(IntegrityError, match=f"delete {made['gather'].path} and give the same command"):
        go(recipe)
    shutil.rmtree(made["gather"].path)
    go(recipe)
    assert manifests(RUN) == before
