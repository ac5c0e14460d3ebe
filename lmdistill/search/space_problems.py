"""What is wrong with a search space, from its keys and the teacher's config.json alone, before any work.

Choices that fit nothing (a width whose heads no kv_heads divides, rows that are no whole blocks of the format) are
named one by one, so that each key means what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lmdistill.search.candidate import Problem
from lmdistill.search.space import MOST_SHAPES, TEACHERS, Shape, Space, SpaceConfig
from lmdistill.students import shape as growth

_GENES = {
    "hidden_sizes": "hidden_size",
    "intermediate_sizes": "intermediate_size",
    "kv_heads": "kv_heads",
    "vocabularies": "vocab_size",
}
_LESS = "candidates inherit from the teacher: ask for less"
NEEDED = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)  # of config.json


def open_space(keys: SpaceConfig, teacher: dict[str, Any], format_name: str) -> tuple[Space | None, list[Problem]]:
    """The space of a teacher's config.json, and what is wrong with either; None where no student can be grown."""
    if found := teacher_problems(keys, teacher):
        return None, found
    space = Space(keys, teacher, format_name)
    return space, problems(space)


def teacher_problems(keys: SpaceConfig, teacher: dict[str, Any]) -> list[Problem]:
    """Why no candidate can inherit from a teacher, by its config.json: a Space is made only of one that has nothing."""
    growable = teacher.get("model_type") in growth.GROWABLE
    if growable and (lacking := [key for key in NEEDED if not teacher.get(key)]):
        return [(f"the teacher's config.json has no `{lacking[0]}`", "take the folder as the model was saved in")]
    asked = SimpleNamespace(
        init="grow",
        architecture="lfm2" if keys.hybrid else "llama",
        layers=teacher.get("num_hidden_layers"),
        attention_layers=1,
        **dict.fromkeys(("hidden_size", "intermediate_size", "heads", "kv_heads")),
    )
    found = growth.problems(asked, teacher)
    if growable and not found:
        found += _unshippable(keys, teacher)
    untied = not teacher.get("tie_word_embeddings", False)
    if growable and untied and not keys.hybrid:  # of an lfm2 it is said already
        found.append(("the teacher's head is not tied to its embeddings, a candidate's is", "use a student stage"))
    return found


def _unshippable(keys: SpaceConfig, teacher: dict[str, Any]) -> list[Problem]:
    """What a Llama-like teacher may have that no candidate has a place for, or that llama.cpp lacks for it."""
    from lmdistill.deployment.architectures import ARCHITECTURES

    instead = "take another teacher, or a `student` stage of `architecture: llama`"
    found = growth.no_place_problems(teacher, "a candidate", instead)
    name = "lfm2" if keys.hybrid else "llama"
    shipped = ARCHITECTURES[name](teacher)
    if (kind := shipped.rope["rope_type"]) not in shipped.rope_types:
        fix = "operators: [attention]" if keys.hybrid else instead
        found.append((f"the teacher's rotary embeddings are of type '{kind}', which llama.cpp's {name} lacks", fix))
    return found


def problems(space: Space) -> list[Problem]:
    """What is wrong with a space, as (what, what to do), from config.json alone."""
    found = _beyond_teacher(space)
    if (count := space.count()) > MOST_SHAPES:
        return [*found, (f"the space has {count:,} shapes", f"list fewer sizes: at most {MOST_SHAPES:,} are tried")]
    if found:
        return found
    shapes = space.shapes()
    if not shapes:
        return [_why_nothing(space)]
    unfit = [
        (
            f"{key}: no candidate can have {value}",
            f"it must fit heads of {space.head_dim} and {space.format_name}",
        )
        for key, gene in _GENES.items()
        for value in space.choices(key)
        if all(getattr(shape, gene) != value for shape in shapes)
    ]
    return unfit + _empty_bands(space, shapes)


def _empty_bands(space: Space, shapes: Sequence[Shape]) -> list[Problem]:
    """Sub-spaces between whose numbers of parameters no shape lies; what `decode_ms` holds is known with a profile."""
    bands = {name: band.parameters for name, band in space.keys.sub_spaces.items() if band.parameters is not None}
    sizes = [space.evenly(shape).parameters / 1e6 for shape in shapes] if bands else []
    found = []
    for name, (low, high) in bands.items():
        nearest = min(sizes, key=lambda size: max(low - size, size - high))
        if not low <= nearest <= high:
            what = f"sub-space '{name}' has no candidate: the nearest has {nearest:.6g} million parameters"
            found.append((what, "widen its bounds, or the space's sizes"))
    return found


def _beyond_teacher(space: Space) -> list[Problem]:
    """Sizes that the teacher has not to give."""
    keys = space.keys
    found: list[Problem] = []
    for key, name in TEACHERS.items():
        own = space.teacher_size(key)
        if beyond := [size for size in space.choices(key) if size > own]:
            found.append((f"{key}: {beyond[0]} is more than the teacher's {name} {own}", _LESS))
    if keys.depth and keys.depth[1] > space.blocks:
        found.append((f"depth {keys.depth[1]} is more than the teacher's {space.blocks}", _LESS))
    if strange := sorted(space.attention_at - set(range(space.blocks))):
        found.append((f"attention_at: the teacher has no block {strange[0]}", f"blocks are 0 to {space.blocks - 1}"))
    if not keys.hybrid and (keys.attention_at is not None or keys.attention_layers is not None):
        found.append(("a llama attends in every layer", "remove attention_at and attention_layers, or allow conv"))
    return found


def _why_nothing(space: Space) -> Problem:
    depth = max(space.depths, default=0)
    numbers = space.attention_numbers(depth)
    if not numbers:
        return ("no number of attention layers fits the depth", "widen depth, attention_layers or attention_at")
    widths = next(space.products())
    what, fix = space.problems_of(Shape(depth, numbers[0], *widths))[0]
    return (f"no candidate can be exported, e.g. of widths {widths}: {what}", fix)
