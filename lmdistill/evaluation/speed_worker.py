"""Holds one open model and times it on request; started by lmdistill.evaluation.speed, one process a file.

    python -m lmdistill.evaluation.speed_worker '{"runtime": "llama.cpp", "path": …, "context": 512, "threads": 2}'

Requests are JSON lines on standard input, `["prefill", 512]`, answers JSON numbers on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lmdistill.errors import LmdistillError


def peak_rss_bytes() -> int:
    """The most memory this process has held, with the interpreter and the pages of mapped weights it touched."""
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM belongs to this program; ru_maxrss would inherit the parent's peak through exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def _serve(job: dict[str, Any], answers: Any) -> None:
    """Answer requests until standard input closes."""
    from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class

    def answer(value: float | None) -> None:
        print(json.dumps(value), file=answers, flush=True)

    options = RuntimeOptions(job["context"], job["threads"], job["device"])
    model = runtime_class(job["runtime"]).open(Path(job["path"]), options, exact=False)
    answer(None)  # open and ready
    for line in sys.stdin:
        what, tokens = json.loads(line)
        if what == "peak_rss_bytes":
            answer(peak_rss_bytes())
        else:
            answer({"prefill": model.prefill_seconds, "decode": model.decode_seconds}[what](tokens))
    model.close()


def main() -> int:
    """Serve the job given as JSON; whatever else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _serve(json.loads(sys.argv[1]), answers)
    except LmdistillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
