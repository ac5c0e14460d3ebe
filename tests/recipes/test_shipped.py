"""The recipes that come along: every key has its comment, and each plans with no network and nothing fetched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmdistill.recipe import load_recipe, shipped_recipes

RECIPES = shipped_recipes()
COMMENT = re.compile(r"(^|\s)# \S")
# Loaded by every Python process at its start: an attempt to reach the network leaves a trace and fails.
NO_NETWORK = """
import pathlib, socket

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        pathlib.Path({trace!r}).write_text(repr(address))
        raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = refuse
"""


def test_the_promised_recipes_are_there() -> None:
    assert {"smoke", "lfm_small", "lfm_350m", "g2sd"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_has_a_comment_and_the_file_a_summary(name: str) -> None:
    summary, *lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    assert summary.startswith("# ") and summary.endswith(".") and len(summary) > 30
    bare = [line for line in lines if line.strip() and not COMMENT.search(line)]
    assert bare == []
    assert load_recipe(RECIPES[name]).name == name


def _planned(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """`lmdistill pipeline NAME --dry-run` with an empty cache and no network."""
    (folder / "sitecustomize.py").write_text(NO_NETWORK.format(trace=str(folder / "trace")))
    return subprocess.run(
        [sys.executable, "-m", "lmdistill", "pipeline", name, "--dry-run"],
        env={**os.environ, "LMDISTILL_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_plans_with_no_network_and_fetches_nothing(name: str, tmp_path: Path) -> None:
    trace, cache = tmp_path / "trace", tmp_path / "cache"
    done = _planned(tmp_path, name)
    assert done.returncode == 0, done.stderr
    for step in load_recipe(name).entries:
        assert re.search(rf"^ +\d+ +{step.name} .* run ", done.stdout, re.MULTILINE), done.stdout
    recipe = load_recipe(name)
    assert recipe.teacher is not None
    corpora = [step.config for step in recipe.entries if step.stage.name == "corpus"]
    members = [member for step in recipe.entries for member in getattr(step.config, "ensemble", ())]
    assets = [recipe.teacher, *members, *(asset for config in corpora for asset in config.sources)]  # type: ignore[attr-defined]
    sources = [asset.source for asset in assets]
    assert [line.removeprefix("would fetch: ") for line in done.stdout.splitlines() if "would fetch" in line] == sources
    assert not trace.exists(), trace.read_text()
    assert not [file for file in cache.rglob("*") if file.is_file()]
    assert {path.name for path in tmp_path.iterdir()} <= {"sitecustomize.py", "__pycache__", "cache"}
