"""What can be known of a search before it runs: its method, its loss, its packages, its space, its budgets."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmdistill.errors import LmdistillError, PreflightError, RecipeError, nearest
from lmdistill.losses import registry
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.search.config import SearchConfig

PACKAGES = ("optuna", "scipy", "llama_cpp")  # the last one where shapes are timed here


def check_search(ctx: PreflightContext[SearchConfig]) -> list[LmdistillError]:
    """All problems that can be known, each with its way out."""
    found = [*_names(ctx), *_packages(ctx)]
    if ctx.teacher is not None and (ctx.teacher.path / "config.json").exists():
        teacher = json.loads((ctx.teacher.path / "config.json").read_text())
        found += _space(ctx, teacher)
    return found


def _names(ctx: PreflightContext[SearchConfig]) -> Iterator[LmdistillError]:
    from lmdistill.search.methods import find_method

    try:
        find_method(ctx.config.method)
    except RecipeError as error:
        yield PreflightError(f"stage '{ctx.name}': {error.what}", fix=error.fix)
    known, chosen = registry.catalogue(), ctx.config.training.loss
    if chosen not in known:
        what = f"stage '{ctx.name}': no loss is called '{chosen}'{nearest(chosen, known)}"
        yield PreflightError(what, fix=f"one of: {', '.join(known)}")
    elif known[chosen].signals in ("live", "sampled"):
        what = f"stage '{ctx.name}': the loss '{chosen}' does not learn from a cache of the teacher's top K"
        yield PreflightError(what, fix="use decoupled_topk, or another loss that does")


def _packages(ctx: PreflightContext[SearchConfig]) -> Iterator[LmdistillError]:
    for package in PACKAGES[:-1] if isinstance(ctx.config.device, Path) else PACKAGES:
        if importlib.util.find_spec(package) is None:
            what = f"stage '{ctx.name}' needs the package {package}"
            yield PreflightError(what, why="not installed", fix="pip install 'lmdistill[search]'")


def _space(ctx: PreflightContext[SearchConfig], teacher: dict[str, Any]) -> Iterator[LmdistillError]:
    from lmdistill.search.profile_checks import profile_problems
    from lmdistill.search.space import Space
    from lmdistill.search.space_problems import problems
    from lmdistill.students import shape

    space = Space(ctx.config.space, teacher, ctx.config.timing.format)
    asked = SimpleNamespace(
        init="grow",
        architecture="lfm2" if space.keys.hybrid else "llama",
        layers=space.blocks,
        attention_layers=1,
        **dict.fromkeys(("hidden_size", "intermediate_size", "heads", "kv_heads")),
    )
    found = shape.problems(asked, teacher)
    if not teacher.get("tie_word_embeddings", False) and not space.keys.hybrid:  # of an lfm2 it is said already
        found.append(("the teacher's head is not tied to its embeddings, a candidate's is", "use a student stage"))
    if not found:
        found = problems(space)
    own = space.teacher_size("vocabularies")
    if any(size != own for size in space.choices("vocabularies")):
        what = "space.vocabularies: the teacher cache is of all the teacher's tokens, and so are its candidates"
        found.append((what, "drop `vocabularies`"))
    for text, fix in found:
        yield PreflightError(f"stage '{ctx.name}': {text}", fix=fix)
    if not found:
        yield from profile_problems(ctx.config, space)
