"""Timing candidates: in groups beside a reference, each shape once, kept as it comes; here and on any device."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import venv
from dataclasses import asdict, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from toys.search_shapes import TOY, toy_space, toy_whole

from lmdistill.errors import IntegrityError, PreflightError
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


def test_a_new_kernel_loses_no_timings(
    groups: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(2)
    device.run(asked, tmp_path / "p.json", tmp_path / "work")
    described = device.describe()
    monkeypatch.setattr(device, "describe", lambda: described | {"system": "Linux 99"})
    device.run(asked, tmp_path / "p.json", tmp_path / "work")
    assert len(groups) == 1
    monkeypatch.setattr(device, "describe", lambda: described | {"cores": 99})
    device.run(asked, tmp_path / "p.json", tmp_path / "work")
    assert len(groups) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0])
@pytest.mark.parametrize("where", ["seconds", "reference", "peak_rss_bytes"])
def test_times_that_nothing_takes_are_no_profile(
    value: float, where: str, groups: list[list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "p.json"
    device.run(request(2), file, tmp_path / "work")
    data = json.loads(file.read_text())
    one = data["measured"][1]
    if where == "peak_rss_bytes":
        one[where] = value
    else:
        one[where][DECODE][0] = value
    file.write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=r"p\.json is a damaged device profile") as refused:
        Profile.read(file)
    assert f"{value} among the times and sizes" in refused.value.render()


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


def test_a_profile_of_something_else_is_not_written_over(groups: list[list[str]], tmp_path: Path) -> None:
    asked, result = request(2), tmp_path / "p.json"
    device.check_result(asked, result)
    device.run(asked, result, tmp_path / "work")
    device.check_result(asked, result)
    device.check_result(request(5), result)  # more shapes: it is gone on with
    with pytest.raises(PreflightError, match=r"its plan has rounds 2, this one 3[^;]*\n.*another --out, or delete it"):
        device.check_result(replace(asked, plan=replace(PLAN, rounds=3)), result)
    with pytest.raises(PreflightError, match="its reference has another shape"):
        device.check_result(replace(asked, reference=asked.candidates[0]), result)
    theirs = json.loads(result.read_text())
    theirs["device"]["processor"] = "Cortex-A76"
    result.write_text(json.dumps(theirs))
    with pytest.raises(PreflightError, match="its device has processor Cortex-A76, this one"):
        device.check_result(asked, result)
    with pytest.raises(PreflightError, match="is a folder"):
        device.check_result(asked, tmp_path)
    result.write_text("{}")
    with pytest.raises(IntegrityError, match="is no device profile"):
        device.check_result(asked, result)


def with_dependencies(*names: str) -> set[str]:
    """Distributions and all that they require here, extras aside."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, distribution(name).requires or [])
            left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has what `pip install llama-cpp-python gguf` brings, and no more."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in with_dependencies("llama-cpp-python", "gguf"):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] != ".."}:
            link = Path(found.stdout.strip()) / top
            if not link.exists():  # a folder may be of several
                link.symlink_to(Path(str(package.locate_file(top))))
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


def test_what_the_machine_refuses_is_one_message(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.search.device_program import main

    asked = tmp_path / "r.json"
    asked.write_text(json.dumps(request(2).to_json()))
    assert main([str(tmp_path)]) == 2
    assert "is no profile request" in capsys.readouterr().err
    assert main([str(asked), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([str(asked), "--out", str(asked / "p.json")]) == 2
    assert "error: [Errno" in capsys.readouterr().err

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device, "write_random_gguf", full)
    assert main([str(asked)]) == 2
    shown = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device" in shown and "do:" in shown


def test_the_script_does_not_write_over_another_devices_profile(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmdistill.search.device_program import main

    asked, result = tmp_path / "r.json", tmp_path / "device_profile.json"
    asked.write_text(json.dumps(request(2).to_json()))
    assert main([str(asked)]) == 0 and main([str(asked)]) == 0 and len(groups) == 1
    before = result.read_bytes()
    assert main([str(asked), "--threads", "2"]) == 2
    assert "its plan has threads 1, this one 2" in capsys.readouterr().err and result.read_bytes() == before


@pytest.mark.parametrize("threads", ["-3", "0", "two"])
def test_a_number_of_threads_that_is_none_is_said(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lmdistill.search.device_program import main

    with pytest.raises(SystemExit) as ended:
        main(["r.json", f"--threads={threads}"])
    assert ended.value.code == 2
    assert f"'{threads}' is no number of threads: 1 or more" in capsys.readouterr().err


def test_the_script_has_the_same_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    for name in "ab":
        write_request(request(1), tmp_path / name)
    assert (tmp_path / "a/profile_device.pyz").read_bytes() == (tmp_path / "b/profile_device.pyz").read_bytes()
