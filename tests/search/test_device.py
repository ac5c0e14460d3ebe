"""Timing candidates: in groups beside a reference, each shape once, kept as it comes; here and on any device."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from toys.search_shapes import TOY, toy_space, toy_whole

from lmdistill.errors import PreflightError
from lmdistill.evaluation.speed import Task, Timed
from lmdistill.search import device, on_device
from lmdistill.search.design import teacher_candidate
from lmdistill.search.keys import TimingConfig
from lmdistill.search.latency import LatencyModel
from lmdistill.search.portable import write_request
from lmdistill.search.profile import DECODE, Profile, Request, TimingPlan
from lmdistill.search.sub_space import whole

PLAN = TimingPlan(prompts=(16,), decode=4, rounds=2, together=2, threads=1)


class Stopped(Exception):
    """Stands for a kill between two groups."""


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the files timed together, in order; timing itself is left out."""
    seen: list[list[str]] = []

    def time(targets: list[Any], plan: Any, tasks: list[Task], logs: Path) -> dict[str, Timed]:
        seen.append([target.name for target in targets])
        assert [task.name for task in tasks].count(DECODE) == PLAN.bursts
        return {target.name: Timed({task.name: [1.0, 2.0] for task in tasks}, 7) for target in targets}

    monkeypatch.setattr(device, "time_in_turns", time)
    return seen


def request(count: int) -> Request:
    sub, rng = toy_whole(), random.Random(0)
    shapes = {each.shape_digest: each for each in (sub.sample(rng) for _ in range(200))}
    return Request(PLAN, sub.largest(), tuple(shapes.values())[:count])


def test_every_group_is_timed_beside_the_reference_and_each_shape_once(groups: list[list[str]], tmp_path: Path) -> None:
    asked = request(5)
    twice = replace(asked, candidates=asked.candidates + asked.candidates)
    profile = device.run(twice, tmp_path / "p.json", tmp_path / "work")
    assert [group[0] for group in groups] == ["reference"] * 3
    assert [name for group in groups for name in group[1:]] == [each.shape_digest for each in asked.candidates]
    assert list(profile.measured) == [each.shape_digest for each in asked.candidates]
    assert not list((tmp_path / "work").glob("*.gguf"))


def test_stopped_it_goes_on_with_what_is_missing(groups: list[list[str]], tmp_path: Path) -> None:
    asked, result = request(6), tmp_path / "p.json"

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        device.run(asked, result, tmp_path / "work", stop)
    before = result.read_text()
    profile = device.run(asked, result, tmp_path / "work")
    assert [len(group) - 1 for group in groups] == [2, 2, 2]
    assert Profile.read(result) == profile
    assert json.loads(result.read_text())["measured"][:4] == json.loads(before)["measured"]


def test_another_plan_or_reference_begins_anew(groups: list[list[str]], tmp_path: Path) -> None:
    asked = request(2)
    device.run(asked, tmp_path / "p.json", tmp_path / "work")
    device.run(replace(asked, plan=replace(PLAN, rounds=3)), tmp_path / "p.json", tmp_path / "work")
    device.run(replace(asked, reference=asked.candidates[0]), tmp_path / "p.json", tmp_path / "work")
    assert len(groups) == 3


def test_a_plan_from_before_bursts_were_counted_has_one() -> None:
    before = asdict(PLAN)
    del before["bursts"]
    assert TimingPlan.from_json(before) == replace(PLAN, bursts=1)


def test_the_teacher_is_timed_where_it_can_be(groups: list[list[str]], tmp_path: Path) -> None:
    timing = TimingConfig(prompts=[16], decode=4, rounds=1, candidates=12, threads=1)
    profile = on_device.profile_of("local", toy_space(), timing, tmp_path)
    assert teacher_candidate(TOY).shape_digest in profile.measured
    assert len(profile.measured) == 13
    with pytest.raises(PreflightError, match=r"q4_0, timing.format is q8_0"):
        on_device.profile_of(
            tmp_path / "profile.json", toy_space(), TimingConfig(prompts=[16], format="q8_0"), tmp_path
        )


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has every package of this one but lmdistill."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.suffix != ".pth" and "lmdistill" not in entry.name:
            (Path(found.stdout.strip()) / entry.name).symlink_to(entry)
    return python


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_another_device_times_a_request_without_lmdistill_and_its_result_is_read(
    bare_python: Path, tmp_path: Path
) -> None:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    alone = subprocess.run([bare_python, "-c", "import lmdistill"], cwd=tmp_path, env=clean, capture_output=True)
    assert alone.returncode != 0

    space = toy_space()
    timing = TimingConfig(prompts=[16], decode=4, rounds=2, candidates=12, together=7, threads=1)
    asked = on_device.request_for(space, timing)
    written, script = write_request(asked, tmp_path / "theirs")
    assert script.stat().st_size < 100_000
    done = subprocess.run(
        [bare_python, script.name, written.name],
        cwd=written.parent,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "send back device_profile.json" in done.stdout
    profile = on_device.profile_of(written.with_name("device_profile.json"), space, timing, tmp_path)
    assert len(profile.measured) == 13 and profile.device["cores"] == os.cpu_count()
    model = LatencyModel.fit(profile)
    figures = model.predict(whole(space).largest()).figures
    assert all(figures[name] > 0 for name in ("decode_tps", "ttft_ms", "ram_mb", "file_mb"))
    for measured in profile.measured.values():
        assert model.predict(measured.candidate).figures["file_mb"] == pytest.approx(
            measured.file_bytes / 1e6, rel=0.02
        )


def test_a_request_that_is_none_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lmdistill.search.device_program import main

    (tmp_path / "r.json").write_text("{}")
    assert main([str(tmp_path / "r.json")]) == 2
    assert "is no profile request" in capsys.readouterr().err
    (tmp_path / "r.json").write_text(json.dumps({**request(2).to_json(), "candidates": [{"layers": 3}]}))
    assert main([str(tmp_path / "r.json")]) == 2
    assert "is a damaged profile request" in capsys.readouterr().err


def test_the_script_has_the_same_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    for name in "ab":
        write_request(request(1), tmp_path / name)
    assert (tmp_path / "a/profile_device.pyz").read_bytes() == (tmp_path / "b/profile_device.pyz").read_bytes()
