"""The stages there are: one file a stage, its name the stage's name, imported when it is asked for.

Besides this folder, the folders named in LMDISTILL_STAGES (separated as in PATH) are searched: to add a stage of your
own, write one file with one `Stage` subclass and point the variable at its folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lmdistill.errors import LmdistillError

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import Stage

OWN = Path(__file__).parent
_loaded: dict[Path, Stage[Any]] = {}


def stage_files() -> dict[str, Path]:
    """Stage name → its file, sorted by name; a folder of LMDISTILL_STAGES goes before lmdistill's own."""
    extra = [Path(part) for part in os.environ.get("LMDISTILL_STAGES", "").split(os.pathsep) if part]
    found: dict[str, Path] = {}
    for folder in (*extra, OWN):
        if not folder.is_dir():
            raise LmdistillError(f"LMDISTILL_STAGES names {folder}, which is no folder", fix="correct the variable")
        for file in sorted(folder.glob("*.py")):
            if not file.stem.startswith("_"):
                found.setdefault(file.stem, file.resolve())
    return dict(sorted(found.items()))


def load_stage(name: str) -> Stage[Any]:
    """The stage called `name`; KeyError where there is none, LmdistillError where its file breaks the contract."""
    file = stage_files()[name]
    if file not in _loaded:
        _loaded[file] = _find_stage(_import(name, file), name, file)
    return _loaded[file]


def _import(name: str, file: Path) -> ModuleType:
    if file.parent == OWN.resolve():
        return importlib.import_module(f"lmdistill.stages.{name}")
    spec = importlib.util.spec_from_file_location(f"lmdistill_stage_{name}", file)
    if spec is None or spec.loader is None:
        raise LmdistillError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


def _find_stage(module: ModuleType, name: str, file: Path) -> Stage[Any]:
    from lmdistill.pipeline.stage import Stage

    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__
    ]
    if len(own) != 1 or own[0].name != name:
        raise LmdistillError(f"{file} must define one Stage whose `name` is '{name}'", why=f"found {own}")
    stage: Stage[Any] = own[0]()
    return stage
