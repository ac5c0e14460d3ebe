"""`--set key=value`: changes a recipe before it is checked; stages are addressed by name (`stages.distill.lr`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdistill.errors import RecipeError, nearest
from lmdistill.recipe.nodes import Node, parse_value, stage_name
from lmdistill.recipe.problems import Problems


def apply_overrides(root: Node, overrides: Sequence[str], problems: Problems) -> Node:
    """`root` with every `key=value` applied, in order; what cannot be applied goes to `problems`."""
    for override in overrides:
        origin = f"--set {override}"
        path, equals, text = override.partition("=")
        steps = path.strip().split(".")
        if not equals or not all(steps):
            problems.add(origin, "", "is not key=value, as in --set stages.distill.lr=5e-4")
        elif steps[0] == "extends":
            problems.add(origin, "", "`extends` is followed before --set is applied; change the file instead")
        else:
            try:
                root = _put(root, steps, 0, parse_value(text, origin), problems)
            except RecipeError as error:
                problems.found.append((origin, error.what))
    return root


def _put(node: Node, steps: Sequence[str], depth: int, value: Node, problems: Problems) -> Node:
    """`node` with `value` at `steps[depth:]`; missing mappings are made, missing list items are not."""
    if depth == len(steps):
        return value
    step, way = steps[depth], ".".join(steps[: depth + 1])
    if isinstance(node.value, list):
        place = _place(node.value, step, way, depth == 1 and steps[0] == "stages", value.origin, problems)
        if place is None:
            return node
        items = list(node.value)
        items[place] = _put(items[place], steps, depth + 1, value, problems)
        return Node(items, node.origin)
    if not isinstance(node.value, dict) and node.value is not None:
        if depth and steps[depth] in ("source", "sha256"):  # an asset written as a bare string
            return _put(Node({"source": node}, node.origin), steps, depth, value, problems)
        problems.add(value.origin, way, f"cannot be set: {'.'.join(steps[:depth])} is the value {node.value!r}")
        return node
    entries: dict[str, Node] = dict(node.value or {})
    inner = entries.get(step, Node(None, value.origin))
    entries[step] = _put(inner, steps, depth + 1, value, problems)
    return Node(entries, node.origin)


def _place(items: Sequence[Node], step: str, way: str, stages: bool, origin: str, problems: Problems) -> int | None:
    """The index that `step` means in a list: a stage's name, or a number."""
    names: list[Any] = [stage_name(item) for item in items] if stages else []
    if step in names:
        return names.index(step)
    if not stages and step.isdigit() and int(step) < len(items):
        return int(step)
    if stages:
        known = [name for name in names if name]
        problems.add(origin, way, f"no stage '{step}' here{nearest(step, known) or ';'} stages: {', '.join(known)}")
    else:
        problems.add(origin, way, f"is no index of this list of {len(items)} (from 0 to {len(items) - 1})")
    return None
