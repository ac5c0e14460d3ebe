"""Which layer of the student learns from which of the teacher's.

Hidden states are counted 0 (the embeddings), n (what block n gives on), the last after the final norm; blocks from 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.errors import PreflightError
from lmdistill.intermediate.keys import IntermediateKeys

if TYPE_CHECKING:
    from lmdistill.students.selection import Fate

Pair = tuple[int, int]  # student's layer, teacher's layer


@dataclass(frozen=True)
class Depths:
    """What a map needs to know of both models."""

    student: int  # blocks
    teacher: int | None  # None: a cache whose teacher is not at hand
    attention: tuple[int, ...] | None = None  # the student's blocks that attend; None: not known yet
    plan: tuple[Fate, ...] = ()  # the fates of the teacher's blocks in a grown student


def recorded_plan(student: Path) -> tuple[Fate, ...]:
    """What became of each block of the teacher that the student in this model folder was grown from; empty: unknown."""
    for name in ("student.json", "training.json"):
        record = student.parent / name
        if record.exists():
            return tuple(json.loads(record.read_text()).get("plan", ()))
    return ()


def pairs(keys: IntermediateKeys, reads: str, depths: Depths) -> list[Pair]:
    """The pairs of layers that `keys.layers` says, in the student's order; PreflightError where there are none such."""
    if isinstance(keys.layers, dict):
        found = _explicit(keys, reads, depths)
    else:
        found = _NAMED[keys.layers](keys, reads, depths)
    if reads == "relations" and depths.attention is not None:
        _need_attention(keys, [layer for layer, _ in found], depths.attention)
    return sorted(found)


def _explicit(keys: IntermediateKeys, reads: str, depths: Depths) -> list[Pair]:
    assert isinstance(keys.layers, dict)
    first = 0 if reads == "hidden" else 1
    found = []
    for pair in keys.layers.items():
        counted = []
        for whose, layer, last in zip(("student", "teacher"), pair, (depths.student, depths.teacher), strict=True):
            lowest = first if whose == "student" or reads == "relations" else 0
            if last is None and layer >= 0:
                counted.append(layer)
                continue
            last = _known(last, keys)
            number = layer if layer >= 0 else last + 1 + layer
            if not lowest <= number <= last:
                raise PreflightError(
                    f"`{keys.loss}`: layer {layer} is not one of the {whose}'s",
                    why=f"it has {lowest} to {last}, or −1 to {lowest - last - 1} from the end",
                    fix="correct `layers`",
                )
            counted.append(number)
        found.append((counted[0], counted[1]))
    if len({layer for layer, _ in found}) < len(found):
        raise PreflightError(f"`{keys.loss}`: `layers` names a layer of the student twice", fix="name each once")
    return found


def _candidates(reads: str, depths: Depths) -> Sequence[int]:
    if reads == "relations" and depths.attention is not None:
        return depths.attention
    return range(1, depths.student + 1)


def _known(teacher: int | None, keys: IntermediateKeys) -> int:
    """The teacher's depth; PreflightError where it is not known."""
    if teacher is None:
        raise PreflightError(
            f"`{keys.loss}`: `layers: {keys.layers}` counts from the teacher's last layer, and its depth is not known",
            why="a cache does not say how many blocks its teacher has, and the recipe's teacher is not the cache's",
            fix="write the teacher's layers as they are in the cache, as in `layers: {-1: 30}`",
        )
    return teacher


def _last(keys: IntermediateKeys, reads: str, depths: Depths) -> list[Pair]:
    return [(layer, _known(depths.teacher, keys)) for layer in _candidates(reads, depths)[-1:]]


def _uniform(keys: IntermediateKeys, reads: str, depths: Depths) -> list[Pair]:
    """At the same share of the depth, halves rounded up."""
    last = _known(depths.teacher, keys)
    return [
        (layer, max(1, (2 * layer * last + depths.student) // (2 * depths.student)))
        for layer in _candidates(reads, depths)
    ]


def _grown(keys: IntermediateKeys, reads: str, depths: Depths) -> list[Pair]:
    """Where a block's output belongs: before the next kept block; relations: with the block it was made of."""
    from lmdistill.students.grow import kept_blocks, spans

    if not depths.plan:
        raise PreflightError(
            "`layers: grown` needs the record of how the student was grown, and this one has none",
            why="student.json of a student with `init: grow` has it, and distillations with `intermediate` hand it on",
            fix="write the pairs, as in `layers: {4: 6, -1: -1}`, or use `uniform`",
        )
    plan: list[Fate] = list(depths.plan)
    if reads == "relations":
        return [(place, block + 1) for place, block in enumerate(kept_blocks(plan), 1) if plan[block] == "full"]
    return [(place, span.stop) for place, span in enumerate(spans(plan), 1)]


_NAMED = {"last": _last, "uniform": _uniform, "grown": _grown}


def _need_attention(keys: IntermediateKeys, layers: Sequence[int], attention: Sequence[int]) -> None:
    without = [layer for layer in layers if layer not in attention]
    if without or not layers:
        raise PreflightError(
            f"`{keys.loss}`: the student's blocks {', '.join(map(str, without)) or '(none)'} have no attention",
            why="relations are those of queries, keys and values",
            fix=f"choose among its blocks {', '.join(map(str, attention)) or '(none attends)'}",
        )
