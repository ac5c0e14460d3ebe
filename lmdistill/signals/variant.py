"""What a variant of the teacher cache is, and the table of those there are.

A variant is one decorated class in one file of `lmdistill/signals/variants/`, named like the file. It says how the
teacher's predictions become coded rows, how coded rows become the bytes of a shard, and the way back. The capture,
the writer, the reader and the checks know nothing else of it.

Axes: R rows, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError, nearest
from lmdistill.signals import coded
from lmdistill.signals.alignment import Misaligned
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.block_cache import BlockCache
from lmdistill.signals.format import Layout
from lmdistill.signals.mapped import MappedFiles
from lmdistill.teachers.engine import TopK


@dataclass(frozen=True)
class Block:
    """A stretch of a shard's bytes under one crc32, and the rows in it; None where it serves all rows."""

    rows: range | None  # counted from the shard's first
    start: int  # bytes from the shard's start
    stop: int
    crc: int


@dataclass
class Memory:
    """What a reader keeps of all its shards, decoded or mapped: bounded, however large the cache is."""

    blocks: BlockCache[NDArray[np.uint8]] = field(default_factory=lambda: BlockCache(2**25))
    tables: BlockCache[Any] = field(default_factory=lambda: BlockCache(2**27))
    files: MappedFiles = field(default_factory=MappedFiles)


class Packer(Protocol):
    """Turns the coded rows of one shard into its blocks of bytes, in order."""

    def add(self, raw_R: NDArray[Any]) -> list[bytes]:
        """Take the next rows; the blocks that are ready."""

    def finish(self) -> list[bytes]:
        """The blocks that are left, once all rows are in."""

    def index(self) -> dict[str, Any]:
        """Fields that the shard's record needs beside the crc32 of each block, for `open` and `blocks`."""


class StoredRows(Protocol):
    """The coded rows of one shard."""

    def copy_rows(self, rows: Sequence[int], out: Sequence[NDArray[np.uint8]]) -> None:
        """Write the bytes of coded rows, counted from the shard's first, each to its place in `out`."""


class Variant(ABC):
    """Base of all variants; coding is that of the top-K cache unless a subclass has its own."""

    name: ClassVar[str]
    access: ClassVar[str]  # "row" or "block": the least that is decoded to read one row

    def dtype(self, layout: Layout) -> np.dtype[Any]:
        """One coded row."""
        return coded.row_dtype(layout)

    def code(self, layout: Layout, tokens_RT: NDArray[Any], flags_RT: NDArray[np.uint8], exact: TopK) -> NDArray[Any]:
        """What the teacher said, as coded rows [R]: all that is lost is lost here."""
        return coded.code_rows(layout, tokens_RT, flags_RT, exact)

    def decode(self, layout: Layout, raw_R: NDArray[Any], batch: SignalsBatch) -> Misaligned | None:
        """Fill `batch` from coded rows; says where log-probs do not belong to their tokens."""
        return coded.decode_rows(layout, raw_R, batch)

    @abstractmethod
    def bytes_bound(self, layout: Layout) -> int:
        """The most bytes a token takes."""

    @abstractmethod
    def packer(self, layout: Layout) -> Packer:
        """A new packer for one shard."""

    @abstractmethod
    def open(self, path: Path, layout: Layout, rows: int, memory: Memory) -> StoredRows:
        """The shard at `path`; its record lies beside it. The caller has checked their bytes."""

    @abstractmethod
    def blocks(self, layout: Layout, rows: int, record: dict[str, Any]) -> Iterator[Block]:
        """The blocks of a shard in order, as its record tells them."""


VariantT = TypeVar("VariantT", bound=type[Variant])
_VARIANTS: dict[str, Variant] = {}
_FOLDER = "lmdistill.signals.variants"


def variant(name: str) -> Callable[[VariantT], VariantT]:
    """Register a class as the variant `name`, the value of `variant:` in a recipe."""

    def register(cls: VariantT) -> VariantT:
        cls.name = name
        _VARIANTS[name] = cls()
        return cls

    return register


@functools.cache
def names() -> tuple[str, ...]:
    """The names of all variants."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(_FOLDER).__path__)))


def get(name: str) -> Variant:
    """The variant `name`; PreflightError with the nearest name where there is none."""
    if name not in names():
        raise PreflightError(
            f"the teacher cache has no variant '{name}'{nearest(name, names())}",
            fix=f"use one of: {', '.join(names())}",
        )
    importlib.import_module(f"{_FOLDER}.{name}")
    return _VARIANTS[name]
