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

from head.case import Case, Shape, Way, case_of


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {field}: peak memory can only be measured on Linux")


def peaks_of(way: Way, shape: Shape, sizes: list[int], live: bool) -> list[int]:
    """Bytes that one step adds to this process at its peak, gradients included, for each number of tokens, rising.

    The highest mark of a process never falls, so a later size can be given too much and never too little.
    """
    way(case_of(Shape(8, 8 * shape.k, shape.width, shape.k, 8), torch.bfloat16, live)).backward()  # loads libraries
    peaks = []
    for tokens in sizes:
        case: Case | None = case_of(shape.of(tokens), torch.bfloat16, live)
        gc.collect()
        before = _status_bytes("VmRSS")
        way(case).backward() if case else None
        peaks.append(_status_bytes("VmHWM") - before)
        case = None
    return peaks


def in_child(script: str, way: str, sizes: list[int], arguments: list[str]) -> list[int]:
    """`peaks_of` in a fresh process of `script`, which answers `--peak-of WAY --sizes …`."""
    command = [sys.executable, script, "--peak-of", way, "--sizes", *map(str, sizes), *arguments]
    found: list[int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found
