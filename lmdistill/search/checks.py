"""What can be known of a search before it runs: its method, its loss, its packages, its space, its budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lmdistill.errors import LmdistillError, PreflightError, RecipeError, nearest
from lmdistill.losses import registry
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.search import packages
from lmdistill.search.config import SearchConfig
from lmdistill.teachers.sampling_keys import SAMPLED

if TYPE_CHECKING:
    from lmdistill.search.space import Space


def check_search(ctx: PreflightContext[SearchConfig]) -> list[LmdistillError]:
    """All problems that can be known, each with its way out."""
    found = [*_names(ctx), *_idle(ctx), *_packages(ctx), *_rows(ctx)]
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
    elif chosen == "none" or known[chosen].signals in ("live", "sampled"):
        what = f"stage '{ctx.name}': the loss '{chosen}' does not learn from a cache of the teacher's top K"
        yield PreflightError(what, fix="use decoupled_topk, or another loss that does")
    cache = ctx.one("signals")
    if getattr(cache.config, "variant", "") == SAMPLED:
        what = f"stage '{ctx.name}' ranks students on the teacher's top K, and '{cache.name}' draws ids"
        yield PreflightError(what, fix=f"set `variant: mmap` or `compact` in '{cache.name}'")


def _rows(ctx: PreflightContext[SearchConfig]) -> Iterator[LmdistillError]:
    """Some rows are left to train on, where the corpus says how many there will be at most."""
    corpus = ctx.one("corpus").config
    tokens, length = getattr(corpus, "train_tokens", None), getattr(corpus, "sequence_length", None)
    if tokens and length and tokens // length <= ctx.config.heldout_rows:
        what = f"stage '{ctx.name}': heldout_rows {ctx.config.heldout_rows} leaves none of {tokens // length} rows"
        yield PreflightError(what, fix="lower `heldout_rows`, or raise the corpus' `train_tokens`")


def _idle(ctx: PreflightContext[SearchConfig]) -> Iterator[LmdistillError]:
    """Keys that ask for what this search will not have made."""
    config = ctx.config
    if config.weights == "tuned" and config.finalists.count == 1:
        what = f"stage '{ctx.name}': `weights: tuned` takes those after a finalist's rounds, and a single one has none"
        yield PreflightError(what, fix="raise `finalists.count`, or drop `weights`")
    if config.weights == "fitted" and not config.finalists.fit_steps:
        what = f"stage '{ctx.name}': `weights: fitted` takes those of fitted blocks, and `finalists.fit_steps` is 0"
        yield PreflightError(what, fix="raise `finalists.fit_steps`, or drop `weights`")
    if config.supernet.keep and config.method == "prune":
        what = (
            f"stage '{ctx.name}': `supernet.keep` keeps shared weights that were trained, `method: prune` trains none"
        )
        yield PreflightError(what, fix="drop `supernet.keep`, or take `method: supernet`")


def _packages(ctx: PreflightContext[SearchConfig]) -> list[PreflightError]:
    timing = () if isinstance(ctx.config.device, Path) else packages.TIMING
    return packages.missing((*packages.SEARCHING, *timing), f"stage '{ctx.name}'")


def _space(ctx: PreflightContext[SearchConfig], teacher: dict[str, Any]) -> Iterator[LmdistillError]:
    from lmdistill.search.profile_checks import profile_problems
    from lmdistill.search.space_problems import open_space

    space, found = open_space(ctx.config.space, teacher, ctx.config.timing.format)
    if space is not None and any(size != teacher["vocab_size"] for size in space.choices("vocabularies")):
        what = "space.vocabularies: the teacher cache is of all the teacher's tokens, and so are its candidates"
        found.append((what, "drop `vocabularies`"))
    for text, fix in found:
        yield PreflightError(f"stage '{ctx.name}': {text}", fix=fix)
    if space is not None and not found:
        yield from _relations(ctx, space)
        yield from profile_problems(ctx.config, space)


def _relations(ctx: PreflightContext[SearchConfig], space: Space) -> Iterator[LmdistillError]:
    """The teacher's attention and every candidate's can be split into the relation heads that are asked for."""
    from lmdistill.intermediate.registry import Site
    from lmdistill.intermediate.terms import sides

    keys, teacher = ctx.config.supernet.relations, SimpleNamespace(**space.teacher)
    if keys is None:
        return
    widths = {(shape.hidden_size, shape.kv_heads): shape for shape in space.shapes()}
    for shape in widths.values():
        candidate = SimpleNamespace(**space.evenly(shape).shape_config())
        for letter in keys.relations:
            try:
                sides(Site(letter, 0), keys.as_intermediate, candidate, teacher)
            except PreflightError as error:
                yield PreflightError(f"stage '{ctx.name}': supernet.relations: {error.what}", fix=error.fix)
                return
