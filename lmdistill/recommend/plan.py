"""How a budget is spent: tokens of each trial, so that students of every depth cost alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import Artefact
from lmdistill.recommend import rules
from lmdistill.recommend.request import Request
from lmdistill.recommend.samples import GROWTH
from lmdistill.students.cost import CPU_FLOPS, of_growing

LEAST_STEPS = 4  # of a trial: fewer tell nothing
DOUBLED = 2  # trials' worth of tokens for the winner's second run, at twice the tokens
OVERHEAD = 4.0  # seconds a trial to load, save and score a small student


@dataclass(frozen=True)
class SweepPlan:
    """What is trained in a sweep."""

    trials: int
    tokens: Mapping[int, int]  # of a trial, by depth
    total: int  # tokens at the middle depth, all trials together
    note: str  # how the budget became tokens

    @property
    def rows_tokens(self) -> int:
        """Tokens the cache needs, so that no trial reads a row twice."""
        return DOUBLED * max(self.tokens.values())


def plan(request: Request, first: rules.Proposal, teacher: dict[str, Any], taught: Artefact) -> SweepPlan:
    """Trials and their tokens; LmdistillError where the budget is too small to tell anything apart."""
    choices = rules.depths(request, teacher)
    sizes = {depth: rules.parameters(first, teacher, depth) for depth in choices}
    step = first.batch_rows * first.sequence_length
    total, note = _total(request, first, teacher, taught, sizes)
    share = total / (request.trials + DOUBLED)
    tokens = {depth: int(share * sizes[first.layers] / sizes[depth]) // step * step for depth in choices}
    if min(tokens.values()) < LEAST_STEPS * step:
        least = LEAST_STEPS * step * (request.trials + DOUBLED) * max(sizes.values()) / sizes[first.layers]
        raise LmdistillError(
            f"--budget {request.budget.text} is too small for {request.trials} trials",
            why=f"it leaves {int(share):,} tokens a trial, and {LEAST_STEPS} steps take {LEAST_STEPS * step:,}{note}",
            fix=f"at least {int(least / 1000) + 1}ktok, or fewer --trials, or --no-sweep for rules alone",
        )
    return SweepPlan(request.trials, tokens, int(total), note)


def _total(
    request: Request, first: rules.Proposal, teacher: dict[str, Any], taught: Artefact, sizes: Mapping[int, int]
) -> tuple[float, str]:
    """Tokens at the first proposal's depth that the budget pays for; seconds by the speed the teacher was run at."""
    if request.budget.tokens is not None:
        return float(request.budget.tokens), ""
    assert request.budget.seconds is not None
    run = json.loads((taught.path / "run.json").read_text(encoding="utf-8"))
    operations = 2 * _teacher_parameters(teacher) * run["tokens"] / run["seconds"]
    growing = sum(_growing(first, teacher, depth, size) for depth, size in sizes.items()) * CPU_FLOPS / operations
    left = request.budget.seconds - growing - (request.trials + 1) * OVERHEAD
    total = max(0.0, left) * operations / (6 * sizes[first.layers])
    return total, (
        f"; at the teacher's measured {run['tokens'] / run['seconds']:,.0f} tokens/s, "
        f"with about {growing:,.0f} s to grow students of {len(sizes)} depths"
    )


def _growing(first: rules.Proposal, teacher: dict[str, Any], depth: int, size: int) -> float:
    """Seconds to grow a student, at the speed that the students' own estimate assumes."""
    from lmdistill.stages.student import StudentConfig

    config = StudentConfig.model_validate({**rules.student_keys(first.architecture, depth), **GROWTH})
    return of_growing(config, teacher, size, first.sequence_length).seconds or 0.0


def _teacher_parameters(teacher: dict[str, Any]) -> int:
    from lmdistill.deployment.planned import planned_parameters
    from lmdistill.stages.student import StudentConfig

    blocks = teacher["num_hidden_layers"]
    whole = StudentConfig(architecture="llama", layers=blocks, attention_layers=blocks)
    return planned_parameters(whole.model_dump(), teacher) or 0
