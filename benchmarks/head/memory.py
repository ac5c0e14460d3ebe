"""Peak memory of a way beyond its inputs: in a process of its own, from what the system says of it.

Axes: none.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from head.case import Shape, Way, case_of, warm_up


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {field}: peak memory can only be measured on Linux")


def peaks_of(way: Way, shape: Shape, sizes: list[int], live: bool) -> list[int]:
    """Bytes that one step adds to this process at its peak, gradients included, for each number of tokens."""
    warm_up([way], shape, live)
    peaks = []
    for tokens in sizes:
        case = case_of(shape.of(tokens), torch.bfloat16, live)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is held now
        before = _status_bytes("VmRSS")
        way(case).backward()
        peaks.append(_status_bytes("VmHWM") - before)
        del case
    return peaks


def in_child(script: str, way: str, sizes: list[int], arguments: list[str]) -> list[int]:
    """`peaks_of` in a fresh process of `script`, which answers `--peak-of WAY --sizes …`."""
    command = [sys.executable, script, "--peak-of", way, "--sizes", *map(str, sizes), *arguments]
    found: list[int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found
