"""Read a recipe: follow `extends`, apply `--set`, check every key, wire the stages; say all that is wrong at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmdistill.errors import RecipeError, nearest
from lmdistill.recipe.nodes import Node, merge, read_yaml, stage_name
from lmdistill.recipe.overrides import apply_overrides
from lmdistill.recipe.problems import Problems
from lmdistill.recipe.schema import ENTRY_KEYS, NAME_PATTERN, TEACHER, Entry, Header, Recipe
from lmdistill.recipe.shipped import resolve_recipe
from lmdistill.recipe.wiring import Draft, wire
from lmdistill.stages import load_stage, stage_files


def load_recipe(reference: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path or of a shipped name, checked and wired; RecipeError names everything that is wrong."""
    file = resolve_recipe(reference)
    root = _read_chain(file, ())
    problems = Problems()
    root = apply_overrides(root, overrides, problems)
    header = _check_header(root, file, problems)
    drafts = _check_entries(root, problems)
    inputs = wire(drafts, _names_teacher(root), problems)
    if header is not None:
        _check_interpreters(root, header, drafts, problems)
    problems.raise_all(str(file))
    assert header is not None  # a header with a problem has raised
    entries = tuple(
        Entry(draft.name, draft.stage, draft.config, inputs[draft.name])
        for draft in drafts
        if draft.stage is not None and draft.config is not None
    )
    return Recipe(header.name, file, header.teacher, header.runtime, entries)


def _names_teacher(root: Node) -> bool:
    """Whether there is a `teacher:`, be it right or wrong: a wrong one is one problem, not one for each stage."""
    assert isinstance(root.value, dict)
    return TEACHER in root.value and root.value[TEACHER].plain() is not None


def _read_chain(file: Path, seen: tuple[Path, ...]) -> Node:
    """The file laid over the one it extends, and so on down."""
    root = read_yaml(file)
    if not isinstance(root.value, dict):
        raise RecipeError(f"{root.origin}: a recipe is a mapping with `name`, `teacher` and `stages`")
    parent = root.value.get("extends")
    if parent is None:
        return root
    if not isinstance(parent.value, str):
        raise RecipeError(f"{parent.origin}: extends: must be the path or the name of a recipe, not {parent.plain()!r}")
    chain = (*seen, file.resolve())
    try:
        beside = file.parent / parent.value
        base_file = beside if beside.is_file() else resolve_recipe(parent.value)
    except RecipeError as error:
        where = f"{parent.origin}: extends: {error.what}"
        raise RecipeError(where, fix=f"{error.fix}; paths are from {file.parent}/") from error
    if base_file.resolve() in chain:
        circle = " → ".join(str(part.name) for part in (*chain, base_file))
        raise RecipeError(f"{parent.origin}: extends: goes in a circle: {circle}")
    base = _read_chain(base_file, chain)
    own = {key: node for key, node in root.value.items() if key != "extends"}
    inherited = {key: node for key, node in base.value.items() if key != "name"}
    return merge(Node(inherited, base.origin), Node(own, root.origin))


def _check_header(root: Node, file: Path, problems: Problems) -> Header | None:
    data = {"name": file.stem, **root.plain()}
    try:
        return Header.model_validate(data)
    except ValidationError as error:
        problems.add_validation(error, Header, root)
        return None


def _check_entries(root: Node, problems: Problems) -> list[Draft]:
    """Every entry of `stages` as far as it can be understood."""
    stages = root.value.get("stages")
    if stages is None:
        return []
    if not isinstance(stages.value, list) or not stages.value:
        problems.add(stages.origin, "stages", "must be a list with at least one stage, as in `- stage: corpus`")
        return []
    drafts: list[Draft] = []
    for place, node in enumerate(stages.value):
        draft = _check_entry(node, f"stages[{place}]", problems)
        if draft is None:
            continue
        if draft.name in {other.name for other in drafts}:
            problems.add(
                node.origin, f"stages.{draft.name}", "another stage has this name; give one a `name:` of its own"
            )
        else:
            drafts.append(draft)
    return drafts


def _check_entry(node: Node, place: str, problems: Problems) -> Draft | None:
    name = stage_name(node)
    if not isinstance(node.value, dict) or name is None:
        problems.add(node.origin, place, "must be a mapping with a `stage:`, as in `- stage: corpus`")
        return None
    for key in ("stage", "name"):
        if key in node.value and not isinstance(node.value[key].value, str):
            problems.add(
                node.value[key].origin, f"{place}.{key}", f"must be a string; given: {node.value[key].value!r}"
            )
    if not re.fullmatch(NAME_PATTERN, name) or name == TEACHER:
        text = "is the reserved name of the teacher" if name == TEACHER else "may hold only a-z, 0-9, _ and -"
        problems.add(node.value.get("name", node).origin, f"stages.{name}", f"the name '{name}' {text}")
    draft = Draft(name, node, _names_from(node, name, problems))
    kind = node.text("stage")
    known = stage_files()
    if kind not in known:
        origin = node.value.get("stage", node).origin
        what = f"unknown stage '{kind}'{nearest(kind, known) or ';'}" if kind else "lacks its `stage:`;"
        problems.add(origin, f"stages.{name}", f"{what} stages: {', '.join(known)}")
        return draft
    draft.stage = load_stage(kind)
    _check_config(draft, problems)
    return draft


def _check_config(draft: Draft, problems: Problems) -> None:
    assert draft.stage is not None
    own = Node({k: v for k, v in draft.node.value.items() if k not in ENTRY_KEYS}, draft.node.origin)
    try:
        draft.config = draft.stage.Config.model_validate(own.plain())
    except ValidationError as error:
        problems.add_validation(error, draft.stage.Config, own, f"stages.{draft.name}")


def _names_from(node: Node, name: str, problems: Problems) -> list[Node]:
    """The nodes of the names in `from:`, a string or a list of strings."""
    given = node.value.get("from")
    if given is None:
        return []
    items: list[Any] = given.value if isinstance(given.value, list) else [given]
    if not items or not all(isinstance(item.value, str) for item in items):
        problems.add(given.origin, f"stages.{name}.from", "must be a stage's name or a list of names")
        return []
    return items


def _check_interpreters(root: Node, header: Header, drafts: Sequence[Draft], problems: Problems) -> None:
    names = [draft.name for draft in drafts]
    for name in header.runtime.python:
        if name not in names:
            place, _ = root.find(("runtime", "python", name))
            text = f"no stage has this name{nearest(name, names) or ';'} stages: {', '.join(names)}"
            problems.add(place.origin, f"runtime.python.{name}", text)
