"""Every command of README.md works as it is written, in its order; what takes long is planned instead of run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from chain import Chain

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLANNED = ("--dry-run", "--explain")


def commands() -> list[str]:
    """The commands in the README's shell blocks; in a console block they follow a `$`."""
    found = []
    for block in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        lines = block.replace("\\\n", " ").splitlines()
        marked = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += marked or [line for line in lines if line and not line.startswith("#")]
    return found


COMMANDS = commands()
OURS = [command for command in COMMANDS if command.startswith("lmdistill ")]


def quick(command: str) -> str:
    """The command as it is, but a pipeline other than smoke's is only planned."""
    is_long = command.startswith("lmdistill pipeline") and "smoke" not in command
    return command if not is_long or any(option in command for option in PLANNED) else f"{command} --dry-run"


def test_there_are_commands() -> None:
    assert "make demo" in COMMANDS and "make test" in COMMANDS
    assert any(command.startswith("lmdistill pipeline recipes/smoke.yaml") for command in OURS)


@pytest.mark.parametrize("command", OURS)
def test_a_command_works(command: str, smoke: Chain) -> None:
    """Run by a shell in a folder that holds what a checkout holds, where smoke has run."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", quick(command)],
        cwd=smoke.folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_knows_its_targets(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if command == "make demo":
        assert "lmdistill pipeline recipes/lfm_small.yaml" in done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python ")])
def test_scripts_are_there_and_know_their_options(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in arguments if option.startswith("--"))


def test_linked_files_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
