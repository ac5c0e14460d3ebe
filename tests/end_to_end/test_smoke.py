"""recipes/smoke.yaml on the embedded teacher, for real: every stage ends well and the ladder is whole."""

from __future__ import annotations

import json

from chain import STAGES, Chain

from lmdistill.pipeline.events import read_events
from lmdistill.recipe import load_recipe

FORMATS = ("f32", "f16", "q8_0", "q4_0", "q4_k_m")
LADDER = {"teacher": "teacher", "student": "student", "distill": "student", "ce": "baseline"}
LADDER |= {f"files/{name}": "file" for name in FORMATS} | {"teacher_files/q4_0": "file"}


def test_smoke_runs_every_stage_of_the_small_recipe() -> None:
    small, smoke = load_recipe("lfm_small"), load_recipe("smoke")
    assert [entry.name for entry in smoke.entries] == [entry.name for entry in small.entries] == list(STAGES)
    assert smoke.teacher == small.teacher
    assert all(smoke.entry(entry.name).inputs == entry.inputs for entry in small.entries)


def test_no_stage_failed(smoke: Chain) -> None:
    events = read_events(smoke.run_dir / "events.jsonl")
    assert [event["stage"] for event in events if event["event"] == "stage_finished"] == list(STAGES)
    assert not [event for event in events if event["event"] in ("stage_failed", "gates_failed", "run_interrupted")]


def test_the_ladder_is_whole_and_in_order(smoke: Chain) -> None:
    report = json.loads((smoke.run_dir / "report.json").read_text())
    rows = {row["name"]: row for row in report["ladder"]}
    assert {name: row["role"] for name, row in rows.items()} == LADDER
    assert 2.5 < rows["teacher"]["nll"] < 4.5, "it is the real one"
    assert all(row["nll"] > rows["teacher"]["nll"] for name, row in rows.items() if not name.startswith("teacher"))
    assert rows["distill"]["nll"] < rows["student"]["nll"], "training helps from the first steps on"
    assert rows["distill"]["params"] == rows["student"]["params"] < rows["teacher"]["params"]
    assert rows["files/f32"]["kl_to_parent"] < 1e-6 and rows["files/f16"]["kl_to_parent"] < 2e-5
    sizes = [rows[f"files/{name}"]["file_bytes"] for name in FORMATS]
    assert sizes[0] > sizes[1] > sizes[2] > max(sizes[3:])
    assert report["signals"]["k"] == 32 and 0.5 < report["signals"]["head_mass"] < 1
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
