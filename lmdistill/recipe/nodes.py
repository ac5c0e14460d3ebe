"""YAML with origins: every value knows the file and line, or the `--set`, that it comes from."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.errors import RecipeError


@dataclass(frozen=True)
class Node:
    """A mapping (`dict[str, Node]`), a list (`list[Node]`) or a scalar, and where it is written."""

    value: Any
    origin: str  # `file:line` or `--set key=value`

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def text(self, key: str) -> str | None:
        """The string at `key` of a mapping; None where there is none."""
        node = self.value.get(key) if isinstance(self.value, dict) else None
        return node.value if node is not None and isinstance(node.value, str) else None

    def find(self, location: Sequence[str | int]) -> tuple[Node, list[str]]:
        """The deepest node on the way to `location`, and the part of the way that exists."""
        node, matched = self, []
        for step in location:
            inner: Node | None = None
            if isinstance(node.value, dict):
                inner = node.value.get(str(step))
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                inner = node.value[step]
            if inner is not None:
                node = inner
                matched.append(str(step))
        return node, matched


def read_yaml(file: Path) -> Node:
    """The YAML file as a tree of nodes; RecipeError with file and line where it is no YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        data = YAML(typ="rt").load(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = (error.problem or "cannot be read").strip().splitlines()[0]
        raise RecipeError(
            f"{where}: not valid YAML: {problem}", fix="check the indentation and quotes there"
        ) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read", why=str(error.strerror)) from error
    return _node(data, str(file), 1)


def parse_value(text: str, origin: str) -> Node:
    """One value of a command line, read as YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return _node(YAML(typ="safe", pure=True).load(text), origin, 0)
    except YAMLError as error:
        raise RecipeError(
            f"{origin}: the value is not valid YAML", fix="quote it, as in --set 'key=\"text\"'"
        ) from error


def _node(data: Any, file: str, line: int) -> Node:
    """`data` as ruamel read it, with the lines it noted; line 0: `file` is an origin by itself."""
    origin = f"{file}:{line}" if line else file
    lines = getattr(getattr(data, "lc", None), "data", None) or {}
    if isinstance(data, dict):
        entries = {str(k): _node(v, file, lines[k][0] + 1 if k in lines else line) for k, v in data.items()}
        return Node(entries, origin)
    if isinstance(data, list):
        return Node([_node(v, file, lines[i][0] + 1 if i in lines else line) for i, v in enumerate(data)], origin)
    return Node(_scalar(data), origin)


def _scalar(data: Any) -> Any:
    if isinstance(data, bool) or data is None:
        return data
    for plain in (int, float, str):
        if isinstance(data, plain):
            return plain(data)  # drops ruamel's round-trip subclasses
    return data.isoformat() if isinstance(data, datetime.date) else str(data)


def stage_name(entry: Node) -> str | None:
    """The name of a stage's entry: `name`, or else `stage`."""
    return entry.text("name") or entry.text("stage")


def merge(base: Node, child: Node, key: str = "") -> Node:
    """`child` laid over `base`: mappings by key, `stages` by name, anything else replaced.

    A mapping with a `source` is an asset and is replaced whole: a digest never outlives its source.
    """
    if key == "stages" and isinstance(base.value, list) and isinstance(child.value, list):
        return _merge_stages(base, child)
    if not (isinstance(base.value, dict) and isinstance(child.value, dict)) or "source" in child.value:
        return child
    merged = dict(base.value)
    for name, node in child.value.items():
        merged[name] = merge(merged[name], node, name) if name in merged else node
    return Node(merged, child.origin)


def _merge_stages(base: Node, child: Node) -> Node:
    merged = list(base.value)
    places = {stage_name(entry): place for place, entry in enumerate(merged)}
    for entry in child.value:
        place = places.get(stage_name(entry))
        if place is None:
            merged.append(entry)
        elif entry.text("stage") in (None, merged[place].text("stage")):
            merged[place] = merge(merged[place], entry)
        else:  # another stage under the same name: none of the old keys would fit
            merged[place] = entry
    return Node(merged, child.origin)
