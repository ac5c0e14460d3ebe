"""A first proposal from measured features alone: rules of thumb, each with its reason; a sweep starts from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from lmdistill.errors import PreflightError
from lmdistill.recommend.features import Features
from lmdistill.recommend.request import Request

STEP_TOKENS = 1024  # in an optimiser step
KEPT_BLOCKS = 0.63  # of the teacher's, as in recipes/lfm_small.yaml (19 of 30)
DEPTHS = (0.4, KEPT_BLOCKS, 0.8)  # shares of the teacher's blocks that a sweep compares
ATTENTION = 0.63  # of a hybrid's blocks, as there (12 of 19)
OWN_TEXT = 0.3  # nats of surprise below which the text is like the teacher's own
TOKENS_A_PARAMETER, MOST_EPOCHS = 20, 4  # beyond which more tokens, or the same again, bring little
THIN_HEAD = 0.7  # mass of the top 32 below which 64 are kept
SHORTEST_ROW, LONGEST_ROW = 64, 1024


@dataclass(frozen=True)
class Proposal:
    """What a recipe needs to know; `reasons` holds a line for each choice."""

    loss: str
    kd_weight: float
    temperature: float
    layers: int
    tokens: int
    sequence_length: int
    k: int
    precision: str
    separator: str
    architecture: str
    reasons: dict[str, str]

    @property
    def batch_rows(self) -> int:
        """Rows in a step."""
        return max(1, STEP_TOKENS // self.sequence_length)

    def because(self, **reasons: str) -> Proposal:
        """The same with other reasons for some choices."""
        return replace(self, reasons={**self.reasons, **reasons})


def student_keys(architecture: str, layers: int) -> dict[str, Any]:
    """The keys of a grown student of this depth."""
    attention = min(max(1, round(ATTENTION * layers)), layers - 1) if architecture == "lfm2" else layers
    return {"architecture": architecture, "layers": layers, "attention_layers": attention}


def grown_architecture(teacher: dict[str, Any]) -> str:
    """lfm2 where a hybrid can be grown from this teacher, else llama; PreflightError where neither can."""
    from lmdistill.students.shape import problems

    found: list[tuple[str, str]] = []
    for architecture in ("lfm2", "llama"):
        keys = student_keys(architecture, min(2, teacher["num_hidden_layers"]))
        widths = dict.fromkeys(("hidden_size", "intermediate_size", "heads", "kv_heads"))
        found = problems(SimpleNamespace(init="grow", **keys, **widths), teacher)
        if not found:
            return architecture
    what, fix = found[0]
    raise PreflightError(f"no student can be recommended: {what}", why=fix, fix="choose a teacher of type llama")


def parameters(proposal: Proposal, teacher: dict[str, Any], layers: int | None = None) -> int:
    """How many the student has, by formula."""
    from lmdistill.deployment.planned import planned_parameters
    from lmdistill.stages.student import StudentConfig

    keys = student_keys(proposal.architecture, layers or proposal.layers)
    return planned_parameters(StudentConfig(**keys).model_dump(), teacher) or 0


def depths(request: Request, teacher: dict[str, Any]) -> tuple[int, ...]:
    """Depths to compare: what was asked for, else some shares of the teacher's; LmdistillError for impossible ones."""
    blocks, least = int(teacher["num_hidden_layers"]), 2
    wrong = [depth for depth in request.depths if not least <= depth <= blocks]
    if wrong:
        raise PreflightError(
            f"--layers {wrong[0]} cannot be grown from a teacher of {blocks} blocks",
            fix=f"choose from {least} to {blocks}",
        )
    if request.depths:
        return tuple(sorted(set(request.depths)))
    return tuple(sorted({min(max(least, round(share * blocks)), blocks) for share in DEPTHS}))


def propose(features: Features, teacher: dict[str, Any], request: Request, precision: str, separator: str) -> Proposal:
    """The proposal that the features make."""
    own = features.surprise <= OWN_TEXT
    choices = depths(request, teacher)
    wanted = round(KEPT_BLOCKS * int(teacher["num_hidden_layers"]))
    first = Proposal(
        loss="decoupled_topk",
        kd_weight=0.9 if own else 0.5,
        temperature=1.0,
        layers=min(choices, key=lambda depth: (abs(depth - wanted), depth)),
        tokens=0,
        sequence_length=_row(features, teacher),
        k=64 if features.head_mass < THIN_HEAD else 32,
        precision=precision,
        separator=separator,
        architecture=grown_architecture(teacher),
        reasons={},
    )
    return sized(first, features, teacher).because(
        loss="by rule: nearest the full KL of what a cache can hold",
        kd_weight=f"by rule: the text surprises the teacher by {features.surprise:.2f} nats, "
        + ("so its word is worth most" if own else "so the text has its say"),
        temperature="by rule: the teacher's distribution as it is",
        layers=f"by rule: nearest {KEPT_BLOCKS:.0%} of the teacher's blocks",
        sequence_length=f"holds 90% of documents whole ({features.length_p90:,} tokens), within "
        f"{SHORTEST_ROW} to {LONGEST_ROW:,}",
        k=f"the teacher's top 32 hold {features.head_mass:.0%} of its mass",
    )


def sized(proposal: Proposal, features: Features, teacher: dict[str, Any]) -> Proposal:
    """The proposal with the tokens that its student and the data ask for."""
    wanted = TOKENS_A_PARAMETER * parameters(proposal, teacher)
    available = max(features.tokens * 19 // 20, 1)  # the rest is held out
    epochs = min(MOST_EPOCHS, max(1.0, wanted / available))
    step = proposal.batch_rows * proposal.sequence_length
    tokens = max(step, int(min(wanted, epochs * available)) // step * step)
    reason = (
        f"{TOKENS_A_PARAMETER} a parameter"
        if tokens >= wanted - step
        else f"{tokens / available:.1f} times the data, which are few for {wanted / TOKENS_A_PARAMETER / 1e6:.0f} M "
        "parameters"
    )
    return replace(proposal, tokens=tokens).because(tokens=reason)


def _row(features: Features, teacher: dict[str, Any]) -> int:
    """The power of two that holds most documents, within what is sensible and what the teacher was made for."""
    longest = min(LONGEST_ROW, int(teacher.get("max_position_embeddings") or LONGEST_ROW))
    row = SHORTEST_ROW
    while row < features.length_p90 and 2 * row <= longest:
        row *= 2
    return row
