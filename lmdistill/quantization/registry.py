"""The table of grids: a grid is one decorated class in one file of `grids/`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from lmdistill.errors import RecipeError, nearest

if TYPE_CHECKING:
    from lmdistill.quantization.grid import Grid

_GRIDS: dict[str, type[Grid]] = {}
AnyGrid = TypeVar("AnyGrid", bound="Grid")


def grid(name: str) -> Callable[[type[AnyGrid]], type[AnyGrid]]:
    """Register a class under `name`; its dataclass fields are the grid's options."""

    def register(cls: type[AnyGrid]) -> type[AnyGrid]:
        cls.name = name
        _GRIDS[name] = cls
        return cls

    return register


def catalogue() -> dict[str, type[Grid]]:
    """All grids by name, sorted."""
    package = importlib.import_module("lmdistill.quantization.grids")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_GRIDS.items()))


def get(name: str, **options: Any) -> Grid:
    """The grid called `name`; RecipeError for a name or an option that there is not."""
    known = catalogue()
    if name not in known:
        raise RecipeError(f"no grid is called '{name}'{nearest(name, known)}", fix=f"one of: {', '.join(known)}")
    allowed = [field.name for field in fields(known[name]) if field.init]
    for option in options:
        if option not in allowed:
            has = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise RecipeError(f"grid '{name}' has no option '{option}'{nearest(option, allowed)}", fix=has)
    return known[name](**options)
