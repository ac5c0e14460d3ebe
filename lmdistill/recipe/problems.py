"""What is wrong with a recipe: collected, so that all of it is said at once, with the nearest right name."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lmdistill.errors import RecipeError, nearest
from lmdistill.recipe.nodes import Node


@dataclass
class Problems:
    """Collects problems; `raise_all` turns them into one RecipeError."""

    found: list[tuple[str, str]] = field(default_factory=list)  # (origin, text)

    def add(self, origin: str, path: str, text: str) -> None:
        """One problem: where it is written, at which key, and what is wrong and allowed."""
        self.found.append((origin, f"{origin}: {path}: {text}" if path else f"{origin}: {text}"))

    def add_validation(self, error: ValidationError, model: type[BaseModel], node: Node, prefix: str = "") -> None:
        """Every finding of pydantic, with the line it is about; a union's findings become one."""
        found: dict[tuple[str, str], list[str]] = {}
        for detail in error.errors(include_url=False):
            location = detail["loc"]
            place, matched = node.find(location)
            text = _explain(detail, model, location)
            if detail["type"] == "missing":
                matched.append(str(location[-1]))
            texts = found.setdefault((place.origin, ".".join([*([prefix] if prefix else []), *matched])), [])
            if text not in texts:
                texts.append(text)
        for (origin, path), texts in found.items():
            self.add(origin, path, "; or ".join(texts))

    def raise_all(self, file: str) -> None:
        """Raise one RecipeError with all that was found, if anything was."""
        lines = [text for origin, text in sorted(self.found, key=lambda found: _by_line(found[0]))]
        if len(lines) == 1:
            raise RecipeError(lines[0])
        if lines:
            raise RecipeError("\n".join([f"{len(lines)} problems in {file}:", *(f"  {line}" for line in lines)]))


def _by_line(origin: str) -> tuple[str, int]:
    """`file:line` as something to sort by."""
    file, _, line = origin.rpartition(":")
    return (file, int(line)) if line.isdigit() else (origin, 0)


def _explain(detail: Any, model: type[BaseModel], location: Sequence[str | int]) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        keys = sorted(allowed_keys(model, location[:-1]))
        return f"unknown key{nearest(str(location[-1]), keys) or ';'} allowed: {', '.join(keys)}"
    if kind == "missing":
        return "missing; it has no default"
    if kind == "literal_error":
        expected = detail["ctx"]["expected"]
        words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
        return f"{given!r} is not allowed{nearest(given, words) or ';'} allowed: {expected}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}; given: {_short(given)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def allowed_keys(model: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """The keys of the model that sits at `location` inside `model`."""
    models: list[type[BaseModel]] = [model]
    for step in location:
        inner = [
            nested
            for candidate in models
            for name, info in candidate.model_fields.items()
            if step in (name, info.alias)
            for nested in models_in(info.annotation)
        ]
        models = inner or models  # an index or a union's tag leads to no other model
    return {info.alias or name for candidate in models for name, info in candidate.model_fields.items()}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models an annotation is built of, through lists, unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, tuple, dict, set, Union, types.UnionType, Annotated):
        return [model for part in get_args(annotation) for model in models_in(part)]
    return []
