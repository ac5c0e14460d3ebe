"""Why a stage runs: its key against that of the nearest earlier artefact of the same name, as changed entries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lmdistill.pipeline.plan import Plan, Step
from lmdistill.pipeline.store import Store, read_key


def explain(plan: Plan) -> list[str]:
    """Lines that say, for every stage, that it is there, goes on, or why it has to run."""
    lines: list[str] = []
    for step in plan.steps:
        if step.state == "cached":
            lines.append(f"{step.name}: cached")
        elif step.state == "left out":
            lines.append(f"{step.name}: left out of this run")
        elif step.state == "resume":
            lines.append(f"{step.name}: goes on from an interrupted run ({_partial(plan.store, step)})")
        elif step.planned.artefact is not None:
            lines.append(f"{step.name}: is made again because of --force")
        else:
            lines += _why(plan, step)
    return lines


def _partial(store: Store, step: Step) -> str:
    return store.partial(step.name, step.key).name


def _why(plan: Plan, step: Step) -> list[str]:
    changes = nearest_changes(plan.store, step)
    if changes is None:
        return [f"{step.name}: never ran in {plan.store.root}"]
    folder, differences = changes
    made_by = {other.planned.fingerprint: other.name for other in plan.steps}
    lines = [f"{step.name}: differs from {folder} in"]
    for place, (old, new) in differences.items():
        maker = f"  (a new result of '{made_by[new]}')" if isinstance(new, str) and new in made_by else ""
        lines.append(f"    {place}: {_short(old)} → {_short(new)}{maker}")
    return lines


def nearest_changes(store: Store, step: Step) -> tuple[str, dict[str, tuple[Any, Any]]] | None:
    """The finished folder of the same name and stage whose key differs least, and where; None if there is none."""
    found: list[tuple[str, dict[str, tuple[Any, Any]]]] = []
    for folder in store.finished():  # newest first: of equals, the newest is shown
        entry = read_key(folder)
        if entry.get("name") == step.name and entry["key"]["stage"] == step.key["stage"]:
            found.append((folder.name, differences(entry["key"], step.key)))
    return min(found, key=lambda item: len(item[1])) if found else None


ABSENT = object()


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted place → (old, new) for every leaf that differs; `ABSENT` where one side lacks it."""
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    places = [*after, *(place for place in before if place not in after)]
    pairs = {place: (before.get(place, ABSENT), after.get(place, ABSENT)) for place in places}
    return {place: pair for place, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]")
    else:
        yield place, value


def _short(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    is_digest = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:12] + "…" if is_digest else text
