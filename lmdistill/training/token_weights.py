"""Weights of tokens in the loss: one decorated function a weighting, from what is known of them to a number ≥ 0 each.

The numbers are scaled so that their mean over the counted tokens of a row is 1. By rows, because a row is the least
that a batch may be split into: the loss is then the same however a step's rows are shared out among small batches and
processes, and no row counts for more or less than without weights. A row in which all numbers are 0 is left out.
Nothing has a gradient here.

Axes: N positions that count, R rows of a batch, K cached entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lmdistill.errors import RecipeError, nearest
from lmdistill.losses.registry import Targets
from lmdistill.training.scoring import next_log_probs
from lmdistill.training.token_keys import TokenWeights


@dataclass(frozen=True)
class TokenView:
    """What a weighting may look at, at the N positions that count."""

    targets: Targets
    teacher_next_N: torch.Tensor  # the teacher's log-prob of the token that follows
    student_next: Callable[[], torch.Tensor]  # the student's `[N]`, at the price of one more product with the head
    row_N: torch.Tensor  # int64, which row of the batch
    rows: int  # R

    @cached_property
    def entropy_N(self) -> torch.Tensor:
        """The teacher's entropy in nats, of the entries and one cell for the rest: at most that over the vocabulary.

        Of drawn ids it is their weighted surprise, whose mean over draws is the entropy.
        """
        logp_NK, weight_NK = self.targets.logp_NK, self.targets.weight_NK
        p_NK = logp_NK.exp() if weight_NK is None else weight_NK
        inside_N = -(p_NK * logp_NK.masked_fill(self.targets.absent_NK, 0.0)).sum(-1)
        if weight_NK is not None:
            return inside_N
        rest_N = self.targets.tail_N.exp()
        return inside_N - torch.special.xlogy(rest_N, rest_N)

    @cached_property
    def gap_N(self) -> torch.Tensor:
        """The student's loss on the text less the teacher's, in nats."""
        return self.teacher_next_N - self.student_next()


Weighting = Callable[[TokenView, TokenWeights], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """A weighting with what is known of it before it runs."""

    function: Weighting
    options: tuple[str, ...]  # the fields of TokenWeights that it reads beside `by` and `of`

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return next(iter((self.function.__doc__ or "").strip().splitlines()), "")


_WEIGHTINGS: dict[str, Entry] = {}


def token_weighting(name: str, options: tuple[str, ...] = ()) -> Callable[[Weighting], Weighting]:
    """Register a function to numbers `[N]`, of which only the proportions inside a row count."""

    def register(function: Weighting) -> Weighting:
        _WEIGHTINGS[name] = Entry(function, options)
        return function

    return register


def weightings() -> dict[str, Entry]:
    """All weightings by name."""
    return dict(sorted(_WEIGHTINGS.items()))


def find_weighting(keys: TokenWeights) -> Entry:
    """The weighting that `keys` name; RecipeError where there is none, or where it does not read a key that is set."""
    known = weightings()
    if keys.by not in known:
        raise RecipeError(
            f"no token weights are called '{keys.by}'{nearest(keys.by, known)}", fix=f"one of: {', '.join(known)}"
        )
    options = {name for entry in known.values() for name in entry.options} - {*known[keys.by].options}
    defaults = {name: info.default for name, info in TokenWeights.model_fields.items()}
    for option in sorted(options):
        if getattr(keys, option) != defaults[option]:
            raise RecipeError(f"token weights '{keys.by}' do not read `{option}`", fix=f"drop `{option}`")
    return known[keys.by]


@token_weighting("uniform")
def uniform(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """Every token the same: what there is without weights."""
    return torch.ones_like(view.teacher_next_N)


@token_weighting("teacher_entropy")
def teacher_entropy(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """By the teacher's entropy: where it has more to say than the text's one token."""
    return view.entropy_N


@token_weighting("teacher_confidence")
def teacher_confidence(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """By 1 over the teacher's perplexity: where it is sure of what comes."""
    return torch.exp(-view.entropy_N)


@token_weighting("no_outliers", options=("nats",))
def no_outliers(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """None for tokens that surprise the teacher by more than `nats`: broken text, noise."""
    return (view.teacher_next_N >= -keys.nats).to(view.teacher_next_N.dtype)


@token_weighting("gap")
def gap(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """By log(1 + exp(student's loss − teacher's)): where the teacher is ahead of the student, as it is now."""
    return torch.nn.functional.softplus(view.gap_N)


@token_weighting("top_gap", options=("share",))
def top_gap(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """Only the `share` of a row's tokens with the largest such gap (Rho-1, arXiv 2404.07965, with our teacher)."""
    largest_N = torch.argsort(view.gap_N, descending=True, stable=True)
    by_row_N = largest_N[torch.argsort(view.row_N[largest_N], stable=True)]
    counts_R = _row_sums(torch.ones_like(view.gap_N), view)
    first_R = counts_R.cumsum(0) - counts_R
    row_N = view.row_N[by_row_N]
    rank_N = torch.arange(len(by_row_N), device=row_N.device) - first_R[row_N]
    kept_N = (rank_N < torch.ceil(keys.share * counts_R)[row_N]).to(view.gap_N.dtype)
    return torch.zeros_like(kept_N).index_copy(0, by_row_N, kept_N)


def _row_sums(values_N: torch.Tensor, view: TokenView) -> torch.Tensor:
    """Sums over the positions of each row `[R]`."""
    return values_N.new_zeros(view.rows).index_add(0, view.row_N, values_N)


@dataclass(frozen=True)
class Places:
    """Where counted positions are in their batch, and what the teacher's cache says of the tokens that follow them."""

    teacher_next_N: torch.Tensor
    row_N: torch.Tensor
    rows: int


def weighed(
    keys: TokenWeights, targets: Targets, places: Places, hidden_ND: torch.Tensor, head_VD: torch.Tensor, chunk: int
) -> Targets:
    """The targets with the weights of their positions, for the student that has these hidden states and this head."""

    def student_next() -> torch.Tensor:
        return next_log_probs(hidden_ND.detach(), head_VD.detach(), targets.next_N, chunk)

    view = TokenView(targets, places.teacher_next_N, student_next, places.row_N, places.rows)
    return replace(targets, scale_2N=weights_of(view, keys))


def weights_of(view: TokenView, keys: TokenWeights) -> torch.Tensor:
    """Weights of the distillation loss and of cross-entropy `[2, N]`, float32; each with mean 1 in every row."""
    with torch.no_grad():
        raw_N = find_weighting(keys).function(view, keys).float()
        sums_R, counts_R = _row_sums(raw_N, view), _row_sums(torch.ones_like(raw_N), view)
        scale_R = torch.where(sums_R > 0, counts_R / sums_R.clamp_min(torch.finfo(raw_N.dtype).tiny), 0.0)
        weight_N = raw_N * scale_R[view.row_N]
        ones_N = torch.ones_like(weight_N)
        return torch.stack([weight_N if keys.of != "ce" else ones_N, weight_N if keys.of != "kd" else ones_N])
