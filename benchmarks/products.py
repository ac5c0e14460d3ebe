"""Matrix products of a student's sizes in float32 and in bfloat16 on this CPU: what `lmdistill/precision.py` rests on.

    python benchmarks/products.py [--json] [--tokens 1024] [--rounds 9]

Both types take turns in a round, so that they meet the same machine; a figure is the median over the rounds, in GFLOPS,
and `bfloat16_over_float32` the median of the rounds' own ratios with its quartiles. Sizes are SmolLM2-135M's: into
its MLP, out of it, and its head. Written to benchmarks/results/products.json. Half a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import hardware

RESULT = Path(__file__).parent / "results" / "products.json"
SIZES = {"mlp_in": (576, 1536), "mlp_out": (1536, 576), "head": (576, 49152)}  # columns in, columns out
TYPES = (torch.float32, torch.bfloat16)


def gflops(tokens: int, size: tuple[int, int], dtype: torch.dtype) -> float:
    """The speed of one product of `[tokens, in]` by `[in, out]`."""
    columns, out = size
    left, right = torch.randn(tokens, columns).to(dtype), torch.randn(out, columns).to(dtype)
    started = time.perf_counter()
    torch.nn.functional.linear(left, right)
    return 2e-9 * tokens * columns * out / (time.perf_counter() - started)


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Each size: both types' medians, and the ratio of one to the other."""
    found: dict[str, Any] = {}
    for name, size in SIZES.items():
        for dtype in TYPES:
            gflops(tokens, size, dtype)  # the first one makes the library's plan
        rows = [[gflops(tokens, size, dtype) for dtype in TYPES] for _ in range(rounds)]
        low, middle, high = statistics.quantiles([half / whole for whole, half in rows], n=4)
        medians = [round(statistics.median(column), 1) for column in zip(*rows, strict=True)]
        found[name] = {
            "gflops": dict(zip(("float32", "bfloat16"), medians, strict=True)),
            "bfloat16_over_float32": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the left matrix")
    parser.add_argument("--rounds", type=int, default=9, help="in which the types take turns; two at least")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    args = parser.parse_args()
    begun = hardware()
    result: dict[str, Any] = measure(args.tokens, args.rounds)
    result["measured"] = {
        "command": " ".join(["python benchmarks/products.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": begun | {"kernels": torch.backends.cpu.get_cpu_capability()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
