"""Where exported files run. One file here is one target: a class decorated with `@target(name)` and its formats."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lmdistill.deployment.formats import Format
from lmdistill.errors import LmdistillError, PreflightError, nearest

if TYPE_CHECKING:
    from lmdistill.deployment.export import Export
    from lmdistill.deployment.logit_source import LogitSource
    from lmdistill.deployment.parity import Parity
    from lmdistill.pipeline.stage import Planned, Progress


class Target(ABC):
    """A runtime's files: what they can hold, how they are made, and what proves them."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # of its files
    runtime: ClassVar[str]  # that scores and times them, in lmdistill/evaluation/runtimes
    formats: ClassVar[Mapping[str, Format]]
    packages: ClassVar[tuple[str, ...]]  # that must be importable
    tools: ClassVar[tuple[str, ...]]  # distributions whose version changes the bytes
    install: ClassVar[str]

    def missing(self) -> LmdistillError | None:
        """What is not installed."""
        lacking = [name for name in self.packages if not importlib.util.find_spec(name)]
        if not lacking:
            return None
        return PreflightError(f"files for {self.name} need {', '.join(lacking)}", why="not installed", fix=self.install)

    @abstractmethod
    def check_runtime(self) -> object:
        """Raise PreflightError where the runtime does not load."""

    @abstractmethod
    def check_config(self, config: Mapping[str, Any], formats: Sequence[str], context: int | None) -> object:
        """Raise PreflightError where a model with this config.json cannot be written in these formats."""

    @abstractmethod
    def check_tokenizer(self, folder: Path) -> object:
        """Raise PreflightError where the runtime cannot have this tokenizer."""

    def check_model(self, model: Planned) -> None:  # noqa: B027 (most targets have nothing against a model)
        """Raise PreflightError where what is known of the model before it is made stands against its export."""

    @abstractmethod
    def packed_formats(self, model: Planned, preset: str) -> tuple[str, ...]:
        """The formats that hold a model trained on the grid `preset` without a second quantisation."""

    @abstractmethod
    def cost(self, config: Mapping[str, Any], formats: Sequence[str]) -> tuple[float, int, str]:
        """Seconds and bytes that writing takes on two cores, and what the plan should say of these formats."""

    @abstractmethod
    def write(self, export: Export, formats: Sequence[Format], progress: Progress) -> None:
        """Make the files that are not there."""

    @abstractmethod
    def opened(self, path: Path, longest: int, threads: int | None) -> AbstractContextManager[LogitSource]:
        """A file open for exact logits of sequences of up to `longest` tokens."""

    @abstractmethod
    def entry(self, export: Export, format_: Format) -> dict[str, Any]:
        """What deployment.json says of a file beside its size, digest and parity."""

    def parity_entry(self, parity: Parity) -> dict[str, Any]:
        """The parity as deployment.json has it."""
        return parity.to_json()

    def rounds_activations(self, export: Export, format_: Format) -> bool:
        """Whether the file computes on rounded activations as its model was trained to."""
        return False

    @abstractmethod
    def prove_tokenizer(self, export: Export, formats: Sequence[Format]) -> dict[str, Any]:
        """Prove that what the runtime tokenises with gives the checkpoint's ids; the counts."""

    @abstractmethod
    def verify_weights(self, path: Path, model: Path, format_: Format) -> int:
        """Raise IntegrityError where a file in this format has not the very weights of `model`; how many tensors."""


_TARGETS: dict[str, Target] = {}
TargetT = TypeVar("TargetT", bound=Target)


def target(name: str) -> Callable[[type[TargetT]], type[TargetT]]:
    """Register a class under `name`."""

    def register(cls: type[TargetT]) -> type[TargetT]:
        cls.name = name
        _TARGETS[name] = cls()
        return cls

    return register


def targets() -> dict[str, Target]:
    """All targets by name; llama.cpp's formats come first."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_TARGETS.items(), key=lambda item: item[0] != "llama.cpp"))


def target_of(format_name: str) -> Target:
    """The target that a format belongs to."""
    return next(one for one in targets().values() if format_name in one.formats)


def format_of(format_name: str) -> Format:
    """The format by its name."""
    return target_of(format_name).formats[format_name]


def by_target(format_names: Sequence[str]) -> dict[Target, list[str]]:
    """Formats by their target, both in order."""
    found: dict[Target, list[str]] = {}
    for name in format_names:
        found.setdefault(target_of(name), []).append(name)
    return found


def exported_format(name: str) -> str:
    """The format's name in lower case; raises ValueError with the nearest name where there is none."""
    known = [format_name for one in targets().values() for format_name in one.formats]
    if name.lower() not in known:
        raise ValueError(f"no format '{name}' (there are {', '.join(known)}){nearest(name.lower(), known)}")
    return name.lower()
