"""What goes wrong: one message with what, why and what to do; nothing lost, nothing wrong read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from toys.fixtures import manifests

from lmdistill.errors import AssetError, LmdistillError, LockedError, PreflightError, StageError
from lmdistill.pipeline import preflight, process
from lmdistill.pipeline.events import read_events
from lmdistill.pipeline.lock import run_lock
from lmdistill.pipeline.plan import make_plan
from lmdistill.pipeline.run import run_pipeline
from lmdistill.recipe import load_recipe

Write = Callable[..., Path]
RUN = Path("runs/toy")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@contextmanager
def failing(recipe: Path, *changes: str, kind: type[LmdistillError]) -> Iterator[list[str]]:
    text: list[str] = []
    with pytest.raises(kind) as caught:
        run_pipeline(make_plan(load_recipe(recipe, changes), RUN))
    assert type(caught.value) is kind
    text.append(caught.value.render())
    yield text


@pytest.mark.parametrize(
    ("how", "kind", "parts"),
    [
        (
            "value",
            StageError,
            ["stage 'learn' failed: ValueError: no such luck", "its log is runs/toy/logs/02-learn.log"],
        ),
        ("own", AssetError, ["the moon is missing", "why: it set", "do:  wait for the night"]),
        ("kill", StageError, ["was killed by signal 9 (SIGKILL)", "out of memory", "the same command goes on"]),
        ("exit", StageError, ["stage 'learn' ended with status 7 and no result"]),
        ("memory", StageError, ["can't allocate memory", "why: it ran out of memory"]),
        ("verify", StageError, ["ValueError: the files do not add up"]),
        ("nan", StageError, ["ValueError: Out of range float values are not JSON compliant"]),
    ],
)
def test_failing_stage(how: str, kind: type[LmdistillError], parts: list[str], write: Write) -> None:
    with failing(write(), f"stages.learn.fail={how}", kind=kind) as text:
        for part in parts:
            assert part in text[0]
    log = (RUN / "logs/02-learn.log").read_text()
    assert ("Traceback" in log) is (how not in ("kill", "exit"))
    assert [event["stage"] for event in read_events(RUN / "events.jsonl") if event["event"] == "stage_failed"] == [
        "learn"
    ]
    assert not list(RUN.glob("*-learn-*[0-9a-f]/manifest.json")), "a failed stage leaves no artefact"
    kept = next(RUN.glob(".partial-learn-*")) / "out" / "model" / "0.txt"
    stamp = kept.stat().st_mtime_ns
    run_pipeline(make_plan(load_recipe(Path("toy.yaml")), RUN))
    after = next(RUN.glob("02-learn-*")) / "out" / "model" / "0.txt"
    assert after.stat().st_mtime_ns == stamp, "what was done before the failure is kept"


def test_preflights_of_all_stages_come_before_the_first(write: Write) -> None:
    text = "stages:\n- stage: gather\n- {stage: gather, name: b, text: b, complain: true}\n"
    text += "- {stage: gather, name: c, text: c, complain: true}\n"
    with failing(write(text), kind=PreflightError) as message:
        assert "2 things stand in the way of this run; nothing was started" in message[0]
        assert "'b' objects" in message[0]
        assert "'c' objects" in message[0]
    assert not list(RUN.glob("*gather*"))


def test_too_little_disk(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 2_000_000))
    text = "stages:\n- {stage: gather, disk: 1000000}\n- {stage: gather, name: b, text: b, disk: 950000}\n"
    with failing(write(text), kind=PreflightError) as message:
        assert "too little disk: this run needs 2.05 MB and runs/toy has 2 MB free" in message[0]
        assert "the largest part is 1 MB for stage 'gather'" in message[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 2_100_000))
    assert len(run_pipeline(make_plan(load_recipe(Path("toy.yaml")), RUN))) == 2


def test_too_little_memory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "total_memory", lambda: 8_000_000)
    with failing(write("stages:\n- {stage: gather, memory: 9000000}\n"), kind=PreflightError) as message:
        assert "too little memory for stage 'gather'" in message[0]
        assert "it needs 9 MB, and this machine has 8 MB" in message[0]


def test_second_pipeline_is_refused(write: Write) -> None:
    recipe = write()
    with run_lock(RUN), failing(recipe, kind=LockedError) as message:
        holder = json.loads((RUN / ".lock.json").read_text())
        assert f"process {holder['pid']} on {holder['host']} holds its lock" in message[0]
    assert len(run_pipeline(make_plan(load_recipe(recipe), RUN))) == 4


def test_wrong_interpreter(write: Write) -> None:
    with failing(write(), "runtime.python.gather=/no/such/python", kind=PreflightError) as message:
        assert "/no/such/python is no usable Python" in message[0]
        assert "correct runtime.python" in message[0]


def test_interrupted_publication_is_completed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write()
    run_pipeline(make_plan(load_recipe(recipe), RUN))
    before = manifests(RUN)
    finished = next(RUN.glob("02-learn-*"))
    finished.rename(RUN / f".partial-learn-{finished.name.rsplit('-', 1)[1]}")
    run_pipeline(make_plan(load_recipe(recipe, ["stages.learn.fail=value"]), RUN))
    assert manifests(RUN) == before


def test_half_written_files_never_reach_an_artefact(write: Write) -> None:
    with failing(write(), "stages.learn.fail=kill", kind=StageError):
        (next(RUN.glob(".partial-learn-*")) / "out" / "model" / ".3.txt.tmp").write_text("half")
    made = run_pipeline(make_plan(load_recipe(Path("toy.yaml")), RUN))
    assert sorted(made["learn"].manifest["files"]) == [f"model/{step}.txt" for step in range(4)]


def test_interpreter_without_lmdistill(write: Write, toys: Path) -> None:
    other = toys / "python"
    other.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo \'{"pydantic": "1"}\' && exit\necho "No module named x" >&2; exit 1\n'
    )
    other.chmod(0o755)
    with failing(write(), f"runtime.python.gather={other}", kind=StageError) as message:
        assert "the preflight ended with status 1 and no result" in message[0]
        assert "why: No module named x" in message[0]


def test_fetching_comes_before_the_first_stage(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with failing(write("stages:\n- stage: gather\n  data: 'pypi:none==1.0/a.txt'\n"), kind=AssetError) as message:
        assert "none==1.0" in message[0]
    names = [event["event"] for event in read_events(RUN / "events.jsonl")]
    assert names[:2] == ["run_started", "fetch_started"]
    assert "stage_started" not in names


def test_the_last_words_of_an_ended_process_are_heard_however_late() -> None:
    """As after Ctrl-Z and fg: the child ended meanwhile, and what it said has not been read yet."""

    def late() -> Iterator[str]:
        time.sleep(0.8)
        yield '{"type": "result", "result": {}}\n'

    class Ended:
        stdout = late()

        def poll(self) -> int:
            return 0

    heard = list(process._messages(cast("Any", Ended())))
    assert heard == [{"type": "result", "result": {}}]


def test_a_process_that_ends_at_once_has_said_everything_and_called_its_exit_handlers() -> None:
    lines = "import atexit; from lmdistill.pipeline.worker import leave; atexit.register(print, 'left', end='')"
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}; print('said', end=' '); leave(3)"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "said left")


def test_only_a_lack_of_memory_is_called_so() -> None:
    said = "ValueError: memory_format is not known"
    assert process.OUT_OF_MEMORY.search(said) is None
    for text in ("MemoryError: ", "CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory"):
        assert process.OUT_OF_MEMORY.search(text)
