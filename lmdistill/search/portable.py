"""A profile request that any device can run: one JSON and one Python script with all it needs of lmdistill inside.

The script is a zip of the very modules that time candidates here (PEP 441: Python runs such a file), so that a phone
and this machine are timed by the same code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from lmdistill.pipeline.files import write_json
from lmdistill.search.profile import Request

SCRIPT, REQUEST = "profile_device.pyz", "profile_request.json"
_ROOT = Path(__file__).parents[1]
_MODULES = (
    "errors",
    "deployment/architectures",
    "deployment/formats",
    "deployment/gguf_header",
    "deployment/gguf_writer",
    "deployment/llama_cpp_runtime",
    "deployment/logit_source",
    "deployment/pretokenizers",
    "deployment/vocabulary",
    "evaluation/divergence",
    "evaluation/file_runtime",
    "evaluation/runtimes/llama_cpp",
    "evaluation/speed",
    "evaluation/speed_worker",
    "pipeline/files",
    "quantization/plan",
    "search/candidate",
    "search/device",
    "search/device_program",
    "search/profile",
    "search/random_gguf",
    "students/parameters",
)
_MAIN = """\
import sys

if sys.version_info < (3, 11):
    sys.exit("error: this needs Python 3.11 or newer, and runs in %s" % sys.version.split()[0])

from lmdistill.search.device_program import main

sys.exit(main())
"""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is packed


def write_request(request: Request, folder: Path) -> list[Path]:
    """Write the request and its script into `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, request.to_json())
    with (folder / SCRIPT).open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, "__main__.py", _MAIN)
            for path in _files():
                _add(archive, str(path.relative_to(_ROOT.parent).as_posix()), path.read_text("utf-8"))
    return [folder / REQUEST, folder / SCRIPT]


def _files() -> list[Path]:
    """The modules' files with the packages they lie in."""
    found: set[Path] = set()
    for module in _MODULES:
        place = _ROOT / module
        found |= set(place.glob("*.py")) if place.is_dir() else {place.with_suffix(".py")}
    packages = {parent for path in found for parent in path.parents if parent == _ROOT or _ROOT in parent.parents}
    return sorted(found | {package / "__init__.py" for package in packages})


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    archive.writestr(info, text)
