"""What a search will cost, before it starts: from the shapes of teacher and space, and the keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.pipeline.stage import Estimate
from lmdistill.students.cost import CPU_FLOPS, SCORED_SHARE

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import PreflightContext
    from lmdistill.search.config import SearchConfig

BASE_SECONDS, BASE_MEMORY = 40, 1_500_000_000
TIMED_SECONDS = 10  # a timed shape, with the reference's share


def of_search(ctx: PreflightContext[SearchConfig]) -> Estimate:
    """Time of timing, ranking, fitting, training and scoring; memory and disk of super-network and optimiser."""
    if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
        return Estimate(note="known when the teacher is on this machine")
    from lmdistill.search.design import teacher_candidate
    from lmdistill.search.space import Space

    config = ctx.config
    teacher = json.loads((ctx.teacher.path / "config.json").read_text())
    space = Space(config.space, teacher, config.timing.format)
    whole = teacher_candidate(teacher).parameters
    shapes = space.shapes()
    if not shapes:
        return Estimate(note="the space has no candidate")
    sizes = [space.evenly(shape).parameters for shape in (shapes[0], shapes[-1])]
    middle = sum(sizes) / 2
    length = getattr(ctx.one("corpus").config, "sequence_length", 1024)
    subs = max(1, len(config.space.sub_spaces))
    tried = config.evolution.population * (config.evolution.generations if config.method == "supernet" else 1) * subs
    ranked = 2 * space.blocks * (1 + config.selection_width / 2) * config.selection_rows * length
    trained = config.supernet.tokens * (2 + config.supernet.random_candidates) * subs
    trained = (trained if config.method == "supernet" else 0) + 2 * config.finalists.count * config.finalists.tokens
    fitted = config.supernet.fit_steps * config.supernet.fit_batch_rows * length
    operations = 2 * whole * (SCORED_SHARE * ranked + config.supernet.importance_rows * length)
    fitted += config.finalists.count * config.finalists.fit_steps * config.supernet.fit_batch_rows * length
    operations += 6 * (whole * fitted + middle * trained) + 2 * middle * tried * config.heldout_rows * length
    timed = 0 if isinstance(config.device, Path) else TIMED_SECONDS * config.timing.candidates
    convolutions = 4 * space.blocks * teacher["hidden_size"] ** 2 if config.space.hybrid else 0
    weights = whole + convolutions
    return Estimate(
        BASE_SECONDS + timed + operations / CPU_FLOPS,
        int(4 * weights * (1 + subs * (2 + 2 * 3)) + 8 * middle * config.finalists.count),
        int(4 * weights * 6 + BASE_MEMORY),
        f"{weights / 1e6:,.0f} M shared parameters; time on two CPU cores",
    )
