"""The benchmarks run as their docstrings say, in small, and give every figure that the documents name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdistill.losses.registry import catalogue

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = "--vocabs 512 --width 64 --tokens 64 --k 8 --chunk 32 --step-rounds 2 --layers 2 --attention-layers 1"


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


def test_the_loss_has_its_figures_by_vocabulary(loss: dict[str, Any]) -> None:
    assert set(loss) == {"512", "measured"}
    figures = loss["512"]
    assert figures["kd_over_ce_time"] > 0 and figures["fused_over_naive_peak"] > 0
    assert 0 < figures["grad_error"] < 1e-5
    assert set(figures["rivals"]) == {"liger_chunked_jsd", "trl_chunked_jsd"}


def test_a_rival_has_both_ratios_or_a_reason(loss: dict[str, Any]) -> None:
    for rival in loss["512"]["rivals"].values():
        there = rival["time_ratio"] is not None
        assert (rival["peak_ratio"] is not None) == there and ("why" in rival) != there


def test_what_lies_behind_the_losss_figures_is_recorded(loss: dict[str, Any]) -> None:
    measured = loss["measured"]
    assert measured["command"].startswith("python benchmarks/loss.py --json")
    assert {"cpu", "cores", "torch", "load_1min"} <= set(measured["hardware"])
    assert (measured["hidden_width"], measured["tokens"], measured["k"]) == (64, 64, 8)
    for behind in measured["by_vocabulary"].values():
        assert len(behind["step"]["kd_over_ce"]["rounds"]) == 2
        assert behind["head_alone"]["best_ce"] in behind["head_alone"]["seconds"]
        assert len(behind["peak_bytes"]["kd"]) == 3
        assert behind["grad_error_bfloat16"] < 2e-2
    assert set(measured["family_over_decoupled_topk"]) == set(catalogue())


SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "machine.py")
HELP = """
import contextlib, io, json, runpy, sys
folder, *scripts = sys.argv[1:]
sys.path.insert(0, folder)
said = {}
for script in scripts:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(f"{folder}/{script}", run_name="__main__")
            code = "it went on"
        except SystemExit as end:
            code = end.code
    said[script] = [code, printed.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[int, str]]:
    """Exit status and output of every script's --help, all in one process, as each imports torch."""
    done = subprocess.run([sys.executable, "-c", HELP, FOLDER, *SCRIPTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_says_how_it_is_run(script: str, helped: dict[str, tuple[int, str]]) -> None:
    assert f"python benchmarks/{script}" in (FOLDER / script).read_text()
    status, said = helped[script]
    assert status == 0 and "--json" in said


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


def test_training_from_a_cache_is_timed_against_gkd_step_by_step(
    toy_llama: Callable[..., Path], tmp_path: Path
) -> None:
    kept = tmp_path / "train.json"
    small = ["--json", "--layers", "2", "--attention-layers", "1", "--rows", "1", "--steps", "2"]
    places = ["--run", tmp_path / "none", "--teacher", toy_llama(num_hidden_layers=2), "--out", kept]
    printed: dict[str, Any] = json.loads(_run("train.py", *small, *map(str, places)))
    assert json.loads(kept.read_text()) == printed
    student, teacher = (printed["setting"]["parameters"][name] for name in ("student", "teacher"))
    assert printed["flops_bound"] == pytest.approx(1 + teacher / (3 * student), abs=1e-3)
    assert printed["ours_tps"] > 0 and printed["trl_gkd_tps"] > 0
    assert printed["ratio_spread"]["q1"] <= printed["ratio"] <= printed["ratio_spread"]["q3"]
    assert {"hardware", "date", "command"} <= set(printed)


def test_products_of_both_types_are_timed_in_turns(tmp_path: Path) -> None:
    kept = tmp_path / "products.json"
    printed: dict[str, Any] = json.loads(_run("products.py", *f"--json --tokens 8 --rounds 3 --out {kept}".split()))
    assert json.loads(kept.read_text()) == printed
    assert set(printed) == {"mlp_in", "mlp_out", "head", "measured"}
    for size in ("mlp_in", "mlp_out", "head"):
        assert min(printed[size]["gflops"].values()) > 0
        low, high = printed[size]["quartiles"]
        assert 0 < low <= printed[size]["bfloat16_over_float32"] <= high
