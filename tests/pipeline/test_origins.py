"""An artefact belongs to the very bytes of its inputs: one key may give others, where a stage measures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_run import RUN, Write, events, go, states
from toys.fixtures import manifests

from lmdistill.errors import LmdistillError
from lmdistill.pipeline import origins

OTHER = "stages.gather.measured=faster"


def texts() -> dict[str, str]:
    """Stage → the end of what it made from the text."""
    files = RUN.glob("[0-9]*/out/model/0.txt")
    return {file.parts[2].split("-")[1]: file.read_text().removeprefix("0 ") for file in files}


def notes() -> list[str]:
    return [event["text"] for event in events("note") if "another" in event["text"]]


def test_what_follows_a_remade_stage_is_made_from_it(write: Write) -> None:
    recipe = write()
    made = go(recipe)
    assert texts() == {"learn": "hello", "again": "hello"}
    shutil.rmtree(made["gather"].path)
    assert go(recipe, OTHER)["gather"].fingerprint == made["gather"].fingerprint
    assert texts() == {"learn": "hellofaster", "again": "hellofaster"}
    assert notes()[0] == "'learn' was made from another 'gather' of the same key: it is made again"
    assert "'summary' was made from another" in notes()[-1]
    assert events("run_finished")[-1]["ran"] == ["gather", "learn", "again", "summary"]
    assert set(states(recipe).values()) == {"cached"} and not list(RUN.glob(".partial-*"))


def test_what_follows_a_stage_remade_alike_is_kept(write: Write) -> None:
    recipe = write()
    made = go(recipe)
    before, stamp = manifests(RUN), made["learn"].path.stat().st_mtime_ns
    shutil.rmtree(made["gather"].path)
    go(recipe)
    assert manifests(RUN) == before and made["learn"].path.stat().st_mtime_ns == stamp and not notes()


def test_force_makes_what_depends_on_other_bytes_again(write: Write) -> None:
    recipe = write()
    go(recipe)
    go(recipe, OTHER, force=("gather",))
    assert texts() == {"learn": "hellofaster", "again": "hellofaster"}


def test_a_stale_result_outside_the_range_is_said_and_planned_for(write: Write) -> None:
    recipe = write()
    shutil.rmtree(go(recipe)["gather"].path)
    go(recipe, OTHER, only="gather")
    assert notes()[0].endswith("it is stale, and left out of this run") and texts()["learn"] == "hello"
    assert states(recipe) == {"gather": "cached"} | dict.fromkeys(("learn", "again", "summary"), "run")
    go(recipe)
    assert texts()["learn"] == "hellofaster" and set(states(recipe).values()) == {"cached"}


def test_what_needs_a_stale_result_that_is_left_out_is_told_why(write: Write) -> None:
    recipe = write()
    shutil.rmtree(go(recipe)["gather"].path)
    go(recipe, OTHER, only="gather")
    shutil.rmtree(next(RUN.glob("04-summary-*")))
    with pytest.raises(LmdistillError, match="from other bytes than its inputs have now"):
        go(recipe, OTHER, only="summary")


def test_half_a_result_of_other_bytes_is_dropped(write: Write) -> None:
    recipe = write()
    with pytest.raises(LmdistillError, match="no such luck"):
        go(recipe, "stages.learn.fail=value")
    assert len(list(RUN.glob(".partial-learn-*/out/model/*"))) == 3
    shutil.rmtree(next(RUN.glob("01-gather-*")))
    made = go(recipe, OTHER)
    assert {file.read_text()[2:] for file in (made["learn"].out / "model").iterdir()} == {"hellofaster"}
    assert not [event["resumed"] for event in events("stage_started") if event["resumed"]]


def test_a_result_of_before_this_was_kept_is_taken(write: Write) -> None:
    recipe = write()
    for artefact in go(recipe).values():
        (artefact.path / origins.FILE).unlink()
    assert set(states(recipe).values()) == {"cached"}
    go(recipe)
    assert not notes()


def test_origins_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    (tmp_path / origins.FILE).write_text("{")
    assert origins.others(tmp_path, {"a": "1"}) == ["a"]
