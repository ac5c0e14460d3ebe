"""The benchmarks run as their docstrings say, in small, and give every figure that the documents name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = "--vocab 512 --width 64 --tokens 64 --k 8 --chunk 32 --rounds 2 --step-rounds 2 --layers 2 --attention-layers 1"


def _run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kept = tmp_path_factory.mktemp("results") / "loss.json"
    printed: dict[str, Any] = json.loads(_run("loss.py", "--json", *SMALL.split(), "--out", str(kept)))
    assert json.loads(kept.read_text()) == printed
    return printed


def test_the_loss_is_timed_alone_and_in_a_step(loss: dict[str, Any]) -> None:
    for timed in (loss["loss"]["bfloat16"], loss["loss"]["float32"], loss["step"]["bfloat16"]):
        assert timed["rival"] in timed["seconds"]
        for ratio in ("kd_over_ce", "kd_over_ce_cores", "kd_over_ce_fused", "kd_over_ce_fused_cores"):
            assert 0 < timed[ratio]["q1"] <= timed[ratio]["median"] <= timed[ratio]["q3"]
    assert len(loss["step"]["bfloat16"]["layers"]) == 2


def test_the_loss_has_autograds_gradients(loss: dict[str, Any]) -> None:
    assert max(loss["gradient_error"]["float32"].values()) < 1e-5
    assert max(loss["gradient_error"]["bfloat16"].values()) < 2e-2


def test_memory_and_setting_are_recorded(loss: dict[str, Any]) -> None:
    assert set(loss["memory"]["bytes"]) == {"kd", "ce_fused", "kd_whole"}
    assert loss["setting"]["vocab"] == 512
    assert loss["command"].startswith("python benchmarks/loss.py --json")
    assert {"cpu", "cores", "torch", "load_1min"} <= set(loss["hardware"])


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py") if path.name != "machine.py"))
def test_every_benchmark_says_how_it_is_run(script: str) -> None:
    assert f"python benchmarks/{script}" in (FOLDER / script).read_text()
    assert "--json" in _run(script, "--help")


def test_sampled_gradients_average_to_the_full_one_and_top_k_stays_away(tmp_path: Path) -> None:
    kept = tmp_path / "sampled.json"
    small = f"--json --tokens 256 --seeds 3 --cache-tokens 512 --out {kept}".split()
    printed: dict[str, Any] = json.loads(_run("sampled.py", *small))
    assert json.loads(kept.read_text()) == printed
    strata, independent = printed["sampled"]["strata"], printed["sampled"]["independent"]
    assert strata["mean_of_seeds"] == pytest.approx(strata["mean_if_unbiased"], rel=0.3)
    assert strata["one_seed"] < independent["one_seed"]
    assert 8 < strata["distinct_ids"] <= 24
    assert abs(strata["kl"] - printed["full"]["kl"]) < 6 * strata["kl_standard_error"]
    assert printed["top_k"]["topk_renormalised"]["distance"] > strata["mean_of_seeds"]
    assert printed["cache"]["bytes_per_token"] > 0 and printed["cache"]["read_tps"] > 0
