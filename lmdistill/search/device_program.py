"""Times what a profile request asks, on the device this runs on. Needs llama-cpp-python and gguf.

    pip install llama-cpp-python gguf
    python profile_device.pyz profile_request.json

It writes random-weight models into a temporary folder, one group at a time, times them with llama.cpp and keeps
device_profile.json beside the request: send that file back. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from lmdistill.errors import LmdistillError, PreflightError

RESULT = "device_profile.json"
_NEEDED = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("request", type=Path, help="profile_request.json")
    parser.add_argument("--out", type=Path, help=f"the result; default: {RESULT} beside the request")
    parser.add_argument("--threads", type=_threads, help="default: as the request says, else the physical cores")
    parser.add_argument("--work", type=Path, help="folder for the models; default: a temporary one")
    return parser.parse_args(given)


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of threads: 1 or more")
    return int(text)


def _check_packages() -> None:
    import importlib.util

    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise PreflightError(f"{' and '.join(missing)} must be installed", fix=f"pip install {' '.join(missing)}")


def _time(arguments: argparse.Namespace) -> Path:
    from lmdistill.search import device
    from lmdistill.search.profile import Request

    request = Request.read(arguments.request)
    if arguments.threads:
        request = replace(request, plan=replace(request.plan, threads=arguments.threads))
    result: Path = arguments.out or arguments.request.with_name(RESULT)
    device.check_result(request, result)

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} timed", flush=True)

    with tempfile.TemporaryDirectory(prefix="profile-device-") as temporary:
        device.run(request, result, arguments.work or Path(temporary), report)
    return result


def main(given: list[str] | None = None) -> int:
    """Run with command line arguments; errors become one message."""
    arguments = _arguments(given)
    # The processes that hold the models are started anew and must find the same code.
    packed = [str(Path(entry).resolve()) for entry in sys.path[:1] if entry.endswith(".pyz")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*packed, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        _check_packages()
        result = _time(arguments)
    except LmdistillError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}\n  do:  set that right; the same command goes on from where it stopped", file=sys.stderr)
        return LmdistillError.exit_code
    print(f"done: send back {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
