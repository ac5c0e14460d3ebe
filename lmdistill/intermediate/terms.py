"""From the keys of `intermediate` to what is compared: sites on both sides, and their widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdistill.errors import PreflightError
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.layer_maps import Pair
from lmdistill.intermediate.registry import Sides, Site


@dataclass(frozen=True)
class Comparison:
    """What one module is given of either side."""

    student: Site
    teacher: Site
    start: Site | None = None  # the teacher's state that a block begins with; None: the student's own


@dataclass(frozen=True)
class Term:
    """One entry of `intermediate` with its layers."""

    name: str  # in the log
    keys: IntermediateKeys
    pairs: tuple[Pair, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def sites(self) -> list[Site]:
        """All that the teacher has to give."""
        found = [side for one in self.comparisons for side in (one.teacher, one.start) if side is not None]
        return list(dict.fromkeys(found))


def term(name: str, keys: IntermediateKeys, reads: str, found: Sequence[Pair]) -> Term:
    """The entry's comparisons at these pairs of layers."""
    if reads == "relations":
        made = [
            Comparison(Site(letter, ours), Site(letter, theirs)) for ours, theirs in found for letter in keys.relations
        ]
    elif reads == "block":
        made = [_of_block(keys, ours, theirs, {0: 0, **dict(found)}) for ours, theirs in found]
    else:
        made = [Comparison(Site("hidden", ours), Site("hidden", theirs)) for ours, theirs in found]
    return Term(name, keys, tuple(found), tuple(made))


def _of_block(keys: IntermediateKeys, ours: int, theirs: int, layers: dict[int, int]) -> Comparison:
    """A block's output; PreflightError where the map does not say which state of the teacher it begins with."""
    if keys.block_input == "student":
        return Comparison(Site("block", ours), Site("hidden", theirs))
    if ours - 1 not in layers:
        raise PreflightError(
            f"`{keys.loss}`: `layers` does not say with which state of the teacher block {ours} begins",
            why=f"that is the pair of layer {ours - 1}, for `block_input: teacher`",
            fix="add it, use `layers: grown` or `uniform`, or `block_input: student`",
        )
    return Comparison(Site("block", ours), Site("hidden", theirs), Site("hidden", layers[ours - 1]))


def attention_shape(config: Any, letter: str) -> tuple[int, int]:
    """(heads, width of all of them) of a model's queries, keys or values, from its configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if letter != "q":
        heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, heads * width


def sides(site: Site, keys: IntermediateKeys, student: Any, teacher: Any, teacher_width: int | None = None) -> Sides:
    """The widths at a site, from both models' configurations; PreflightError where relation heads do not divide them.

    `teacher` may be None for hidden states, whose width a cache says.
    """
    if site.kind in ("hidden", "block"):
        widths = Sides(student.hidden_size, teacher_width or teacher.hidden_size)
        if site.kind == "block" and widths.student != widths.teacher:
            raise PreflightError(
                f"`{keys.loss}` compares blocks of one width, not {widths.student} (student) and {widths.teacher}",
                fix="use hidden_mse, which learns a map between widths, or a student of the teacher's width",
            )
        return widths
    (_, ours), (heads, theirs) = attention_shape(student, site.kind), attention_shape(teacher, site.kind)
    split = keys.relation_heads or heads
    for whose, width in (("student", ours), ("teacher", theirs)):
        if width % split:
            raise PreflightError(
                f"`{keys.loss}`: {split} relation heads do not divide the {whose}'s {width} values of {site.kind}",
                fix="set `relation_heads` to a divisor of both widths, or leave that one out of `relations`",
            )
    return Sides(ours, theirs, split)
