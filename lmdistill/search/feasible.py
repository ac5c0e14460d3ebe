"""Whether any candidate can keep the budgets, by the latency model, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.search.budget import Budget, Figures, violations
from lmdistill.search.candidate import Candidate
from lmdistill.search.design import teacher_candidate
from lmdistill.search.latency import LatencyModel
from lmdistill.search.profile import Profile
from lmdistill.search.sub_space import SubSpace


def teacher_figures(profile: Profile, model: LatencyModel, teacher: Mapping[str, Any]) -> dict[str, float]:
    """The teacher's figures on the device: measured where the profile has them, else foretold."""
    candidate = teacher_candidate(teacher)
    measured = profile.measured.get(candidate.shape_digest)
    return model.predict(candidate).figures if measured is None else profile.figures(measured)


def unmeasured(budgets: Sequence[Budget], profile: Profile) -> list[str]:
    """Budgets on prompts that the profile has not timed, each as a sentence."""
    prompts = profile.plan.prompts
    return [
        f"'{budget}': the profile has prompts of {', '.join(map(str, prompts))} tokens"
        for budget in budgets
        if budget.prompt is not None and budget.prompt not in prompts
    ]


def infeasible(
    budgets: Sequence[Budget],
    sub_spaces: Sequence[SubSpace],
    model: LatencyModel,
    teacher: Figures,
    where: str = "the space",
) -> LmdistillError | None:
    """None where some candidate is foretold to keep all budgets, else the error with the nearest point."""
    if not budgets:
        return None
    best: tuple[float, Candidate, Figures] | None = None
    reach = [float("inf")] * len(budgets)
    for sub in sub_spaces:
        for candidate in sub.one_of_each_shape():
            figures = model.predict(candidate).figures
            missed = violations(budgets, figures, teacher)
            reach = [min(pair) for pair in zip(reach, missed, strict=True)]
            if max(missed) <= 0:
                return None
            if best is None or max(missed) < best[0]:
                best = max(missed), candidate, figures
    assert best is not None, "a sub-space has at least one shape"
    return _refusal(budgets, best[1], best[2], reach, teacher, where)


def _refusal(
    budgets: Sequence[Budget],
    nearest: Candidate,
    figures: Figures,
    reach: Sequence[float],
    teacher: Figures,
    where: str,
) -> PreflightError:
    alone = [
        _out_of_reach(budget, missed, teacher) for budget, missed in zip(budgets, reach, strict=True) if missed > 0
    ]
    together = "each could be kept alone, but not all by one candidate"
    return PreflightError(
        f"no candidate of {where} keeps the budgets " + " and ".join(f"'{budget}'" for budget in budgets),
        why="; ".join(alone) or together,
        fix=f"the nearest point is {_point(budgets, figures)} ({_shape(nearest)}): allow that, or widen {where}",
    )


def _out_of_reach(budget: Budget, missed: float, teacher: Figures) -> str:
    """The best that any candidate has of one figure."""
    limit = budget.limit(teacher)
    most = limit * (1 - missed) if budget.at_least else limit * (1 + missed)
    word = "at most" if budget.at_least else "at least"
    return f"{budget.figure} is {word} {_number(most)} on this device, '{budget}' asks for {_number(limit)}"


def _point(budgets: Sequence[Budget], figures: Figures) -> str:
    named = dict.fromkeys(budget.figure for budget in budgets)
    return ", ".join(f"{name} {_number(figures[name])}" for name in named)


def _shape(candidate: Candidate) -> str:
    return (
        f"{candidate.depth} layers, {candidate.attention_layers} of them attention, width {candidate.hidden_size}, "
        f"MLP {candidate.intermediate_size}, {candidate.kv_heads} key heads"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
