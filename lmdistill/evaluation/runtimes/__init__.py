"""Runtimes that can be scored and timed. One file here is one runtime: decorate its class with `@runtime(name)`.

Axes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from lmdistill.errors import PreflightError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RuntimeOptions:
    """How to open a model: the sizes it must serve, and where and how fast."""

    context: int  # longest sequence, tokens
    threads: int | None = None  # None: the physical cores
    device: str = "cpu"


class ScoringRuntime(Protocol):
    """An open model that gives log-probabilities, and times itself."""

    def log_probs(self, tokens_T: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
        """Natural log-probabilities [T, V] of the token after each one, over the first `vocab_size` ids."""

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds to read a prompt of `tokens` tokens from an empty context."""

    def decode_seconds(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens one at a time from an empty context, as generation does."""

    def close(self) -> None:
        """Give the memory back."""


class RuntimeClass(Protocol):
    """What a runtime's class offers beside its instances."""

    @staticmethod
    def missing() -> str | None:
        """What must be installed before this runtime can open anything; None where nothing is missing."""

    @staticmethod
    def open(path: Path, options: RuntimeOptions, *, exact: bool) -> ScoringRuntime:
        """Open a model; `exact` for scores, otherwise the settings a user of the runtime gets."""


_registry: dict[str, RuntimeClass] = {}
ClassT = TypeVar("ClassT", bound=RuntimeClass)


def runtime(name: str) -> Callable[[type[ClassT]], type[ClassT]]:
    """Register a runtime's class under the name that report.json gives it."""

    def register(cls: type[ClassT]) -> type[ClassT]:
        _registry[name] = cls
        return cls

    return register


def runtime_class(name: str) -> RuntimeClass:
    """The runtime called `name`; raises PreflightError with the known names."""
    if name not in _registry:  # some may be there already: a runtime's module can be imported by itself
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
    if name not in _registry:
        raise PreflightError(f"no runtime '{name}'", why=f"there are {', '.join(sorted(_registry))}")
    return _registry[name]
