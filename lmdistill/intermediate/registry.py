"""Intermediate losses: what one is, and the table of those there are.

A loss is one decorated class in a file of this folder: a module that is made for one pair of layers, is given what the
student and the teacher computed there, and returns a sum over the positions that count. Its parameters, if it has any,
are trained with the student and dropped with it.

Axes: R rows, T positions, D width of what is compared (Ds the student's, Dt the teacher's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmdistill.errors import PreflightError, nearest
from lmdistill.intermediate.keys import COMMON, IntermediateKeys
from lmdistill.modules import import_all

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Site:
    """Something that a model computes: the hidden state of a layer, a block's q, k or v, or a block by itself."""

    kind: str  # hidden | q | k | v | block
    layer: int  # hidden: 0 the embeddings, n block n, the last after the final norm; else blocks from 1


@dataclass(frozen=True)
class Sides:
    """What a loss is made for: the widths of what it compares, and the heads of the teacher there."""

    student: int  # Ds
    teacher: int  # Dt
    heads: int = 1


@dataclass(frozen=True)
class Positions:
    """Which positions of the rows count, and which document each belongs to where packing keeps them apart."""

    counts_RT: torch.Tensor  # bool
    document_RT: torch.Tensor | None = None  # int64


Make = Callable[[Sides, IntermediateKeys], Any]  # → a module of (student [R, T, Ds], teacher [R, T, Dt], Positions)


@dataclass(frozen=True)
class Entry:
    """An intermediate loss with what is known of it before it runs."""

    make: Make
    reads: str  # hidden | relations | block
    options: tuple[str, ...]  # the keys that it reads, beside those that all do

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return next(iter((self.make.__doc__ or "").strip().splitlines()), "")

    def unread(self, keys: IntermediateKeys) -> list[str]:
        """Keys that are not at their default and that this loss does not read."""
        fields = {name: info.default for name, info in type(keys).model_fields.items()}
        changed = [name for name, default in fields.items() if getattr(keys, name) != default]
        return [name for name in changed if name not in (*COMMON, *self.options)]


_LOSSES: dict[str, Entry] = {}


def intermediate(name: str, reads: str, options: tuple[str, ...] = ()) -> Callable[[Make], Make]:
    """Register a class under `name`, the value of `loss:` in an entry of `intermediate`; see `Entry`."""

    def register(make: Make) -> Make:
        _LOSSES[name] = Entry(make, reads, options)
        return make

    return register


def catalogue() -> dict[str, Entry]:
    """All intermediate losses by name, sorted."""
    import_all("lmdistill.intermediate")
    return dict(sorted(_LOSSES.items()))


def entry(name: str) -> Entry:
    """The loss called `name`; PreflightError with the nearest name where there is none."""
    known = catalogue()
    if name in known:
        return known[name]
    raise PreflightError(
        f"no intermediate loss is called '{name}'{nearest(name, known)}", fix=f"one of: {', '.join(known)}"
    )
