"""A stage's keys as a table, made from its `Config`: type, default, description."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lmdistill.pipeline.keys import is_runtime
from lmdistill.recipe.problems import models_in


@dataclass(frozen=True)
class Key:
    """One key of a configuration."""

    path: str  # dotted; `[]` after a list's name
    type: str
    default: str
    description: str
    runtime: bool  # never part of the fingerprint


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of `model` and of the models inside it, in order."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        default = "required" if info.is_required() else _default(info.get_default(call_default_factory=True))
        bounds = "".join(f" {text}" for mark in info.metadata if (text := _bound(mark)))
        kind = type_text(info.annotation) + bounds
        yield Key(path, kind, default, info.description or "", is_runtime(info.metadata, info.annotation))
        inner = f"{path}[]." if get_origin(info.annotation) in (list, tuple) else f"{path}."
        for nested in models_in(info.annotation):
            yield from keys_of(nested, inner)


def type_text(annotation: Any) -> str:
    """An annotation as a recipe's author thinks of it: `int`, `list of text`, `'kd' | 'ce'`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin is Annotated:
        return type_text(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(part) for part in parts)
    if origin in (list, tuple, set, frozenset):
        return f"list of {type_text(parts[0])}" if parts else "list"
    if origin is dict:
        return f"mapping to {type_text(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    names: dict[Any, str] = {str: "text", bool: "true | false", float: "number", int: "int"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bound(mark: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
    return ", ".join(f"{sign} {getattr(mark, name)}" for name, sign in signs.items() if hasattr(mark, name))


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see its keys"
    return json.dumps(value, default=str, ensure_ascii=False)
