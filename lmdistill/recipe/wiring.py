"""Who feeds whom: each input takes the newest earlier artefact of a kind that fits, or what `from:` names.

The names in `from:` are matched to a stage's inputs by kind: single inputs first, in their order, then those that take
many. Inputs that no listed name fits keep their default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdistill.errors import nearest
from lmdistill.pipeline.stage import Input, Stage, StageConfig
from lmdistill.recipe.nodes import Node
from lmdistill.recipe.problems import Problems
from lmdistill.recipe.schema import TEACHER


@dataclass
class Draft:
    """A stage's entry on its way through the checks; None marks what could not be understood."""

    name: str
    node: Node
    listed: list[Node]  # the names in `from:`
    stage: Stage[Any] | None = None
    config: StageConfig | None = None


Sources = list[tuple[str, str]]  # (name, kind), oldest first


def wire(drafts: Sequence[Draft], has_teacher: bool, problems: Problems) -> dict[str, dict[str, tuple[str, ...]]]:
    """For each stage, role → names of the entries that play it; what does not fit goes to `problems`."""
    inputs: dict[str, dict[str, tuple[str, ...]]] = {}
    unknown = False  # an earlier stage could not be understood: it may have made what is missing
    for place, draft in enumerate(drafts):
        if draft.stage is None:
            unknown = True
            continue
        earlier = [(other.name, other.stage.output) for other in drafts[:place] if other.stage]
        listed = _listed(draft, drafts, earlier, has_teacher, problems)
        roles = draft.stage.inputs if draft.config is None else draft.stage.inputs_for(draft.config)
        inputs[draft.name] = _match(draft, roles, earlier, listed, unknown, problems)
        if draft.config is not None and draft.stage.uses_teacher(draft.config) and not has_teacher:
            problems.add(draft.node.origin, f"stages.{draft.name}", "needs a teacher; add `teacher:` to the recipe")
    return inputs


def _listed(draft: Draft, drafts: Sequence[Draft], earlier: Sources, has_teacher: bool, problems: Problems) -> Sources:
    """The (name, kind) of every name in `from:` that is there to be taken."""
    kinds = dict(earlier) | ({TEACHER: "model"} if has_teacher else {})
    listed: Sources = []
    for node in draft.listed:
        name, path = node.value, f"stages.{draft.name}.from"
        later = [other.name for other in drafts if other.name not in dict(earlier)]
        if name in kinds:
            listed.append((name, kinds[name]))
        elif name == TEACHER:
            problems.add(node.origin, path, "'teacher' is not there: add `teacher:` to the recipe")
        elif name in later and next(other for other in drafts if other.name == name).stage is None:
            continue  # its own problem has been said
        elif name in later:
            problems.add(node.origin, path, f"'{name}' does not come before '{draft.name}'; move it up or name another")
        elif name not in {other.name for other in drafts}:
            text = f"no stage '{name}'{nearest(name, kinds) or ';'} earlier stages: {', '.join(kinds) or 'none'}"
            problems.add(node.origin, path, text)
    return listed


def _match(
    draft: Draft, roles: Sequence[Input], earlier: Sources, listed: Sources, unknown: bool, problems: Problems
) -> dict[str, tuple[str, ...]]:
    left, taken = list(listed), set[str]()
    matched: dict[str, tuple[str, ...]] = {}
    for role in sorted(roles, key=lambda role: role.many):
        fitting = [item for item in left if item[1] in role.kinds]
        if fitting:
            chosen = fitting if role.many else fitting[:1]
            left = [item for item in left if item not in chosen]
        else:
            chosen = [item for item in earlier if item[1] in role.kinds and item[0] not in taken]
            chosen = chosen if role.many else chosen[-1:]
        matched[role.role] = tuple(name for name, _ in chosen)
        taken.update(matched[role.role])
        if not chosen and not role.optional and not unknown:
            kinds = " or ".join(role.kinds)
            text = f"needs a {kinds} ({role.role}), and no earlier stage makes one; put that stage before it"
            problems.add(draft.node.origin, f"stages.{draft.name}", text)
    for name, kind in left:
        wanted = ", ".join(sorted({kind for role in roles for kind in role.kinds})) or "nothing"
        text = f"'{name}' is a {kind}, which no input is left for; '{draft.name}' takes: {wanted}"
        problems.add(draft.node.value["from"].origin, f"stages.{draft.name}.from", text)
    return {role.role: matched[role.role] for role in roles}
