"""Decoded things that may be wanted again, the most lately used, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that knows its memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


ThingT = TypeVar("ThingT", bound=Sized)


class BlockCache(Generic[ThingT]):
    """Keeps the last used; at least one whatever its size."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self._bytes = most_bytes, 0
        self._kept: OrderedDict[Hashable, ThingT] = OrderedDict()

    def find(self, key: Hashable) -> ThingT | None:
        """The thing called `key`, if it is here."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Hashable, made: ThingT) -> ThingT:
        """Keep a thing that was not here, and give it back."""
        self._kept[key] = made
        self._bytes += made.nbytes
        while self._bytes > self.most_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made
