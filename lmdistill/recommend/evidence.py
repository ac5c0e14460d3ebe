"""What a sweep found: the winner as a proposal, and all trials as evidence for the recipe's head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmdistill.recommend.plan import SweepPlan
from lmdistill.recommend.recipe_text import table
from lmdistill.recommend.request import Request
from lmdistill.recommend.rules import Proposal
from lmdistill.recommend.sweep import Outcome, Params, winner


def conclude(
    first: Proposal,
    outcomes: Sequence[Outcome],
    doubled: Outcome,
    planned: SweepPlan,
    request: Request,
) -> tuple[Proposal, list[str]]:
    """The winner as a proposal, and the sweep as evidence."""
    chosen, why = winner(list(outcomes))
    params = chosen.params
    proposal = replace(
        first,
        loss=params["loss"],
        layers=params["layers"],
        kd_weight=params.get("kd_weight", first.kd_weight),
        temperature=params.get("temperature", first.temperature),
    )
    reasons = dict.fromkeys(("loss", "kd_weight", "temperature", "layers"), f"measured: {why}")
    gain = chosen.nll - doubled.nll
    budget = request.budget.text
    if request.budget.tokens is None:  # what repeats it elsewhere
        budget += f", here {planned.total}tok{planned.note}"
    head = ("loss", "λ", "τ", "layers", "M parameters", "tokens", "held-out NLL", "over the best")
    best = min(outcomes, key=lambda one: one.nll)
    evidence = [
        f"Sweep: {len(outcomes)} trainings of like cost, from students grown quickly, on a budget of {budget}; seed "
        f"{request.seed}; held-out loss on {sum(chosen.predictions_R):,} predictions, differences with their standard "
        "error over rows:",
        *table(head, (_row(one, best) for one in sorted(outcomes, key=lambda one: one.nll))),
        f"Chosen: {words(params)}: {why}. {_against_ce(outcomes, chosen)}",
        f"At twice the tokens ({doubled.tokens:,}) its loss is {doubled.nll:.4f}, {gain:+.4f} nats gained by doubling. "
        "Short trainings rank choices; they do not foretell a long one: the recipe trains a baseline beside it.",
    ]
    return proposal.because(**reasons), evidence


def _row(outcome: Outcome, best: Outcome) -> list[str]:
    params, (excess, error) = outcome.params, outcome.over(best)
    return [
        params["loss"],
        f"{params['kd_weight']:g}" if "kd_weight" in params else "",
        f"{params['temperature']:g}" if "temperature" in params else "",
        str(params["layers"]),
        f"{outcome.parameters / 1e6:.1f}",
        f"{outcome.tokens:,}",
        f"{outcome.nll:.4f}",
        "" if outcome is best else f"{excess:+.4f} ± {error:.4f}",
    ]


def words(params: Params) -> str:
    """A point of the search space as people say it."""
    parts = [params["loss"], f"{params['layers']} layers"]
    parts += [f"λ = {params['kd_weight']:g}"] if "kd_weight" in params else []
    parts += [f"τ = {params['temperature']:g}"] if "temperature" in params else []
    return ", ".join(parts)


def _against_ce(outcomes: Sequence[Outcome], chosen: Outcome) -> str:
    """What the teacher is worth: the chosen against the best cross-entropy of its depth."""
    same = [one for one in outcomes if one.params["loss"] == "ce" and one.params["layers"] == chosen.params["layers"]]
    if chosen.params["loss"] == "ce":
        return "The teacher brought nothing here that the text did not."
    if not same:
        return "Cross-entropy was not tried at its depth."
    gap, error = chosen.over(same[0])
    return f"Against cross-entropy at its depth: {gap:+.4f} ± {error:.4f} nats."
