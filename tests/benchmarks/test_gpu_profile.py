"""The GPU's profile: null where there is none; its code walks on the CPU, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_profile.py"
SMALL = "--device cpu --rows 2 --length 16 --vocab 128 --width 64 --layers 2 --k 4 --chunk 8"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be profiled")
def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    done = _run()
    assert json.loads(done.stdout) is None and "no GPU" in done.stderr


def test_a_profile_gives_time_and_kernels() -> None:
    found = json.loads(_run(*SMALL.split()).stdout)
    assert found["eager"]["step_ms"] > 0 and found["eager"]["tokens_per_second"] > 0
    shares = [one["share"] for one in found["eager"]["kernels"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
