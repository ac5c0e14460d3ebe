"""Losses on cached teacher signals: what one is, and the table of those there are.

A loss is one decorated function in one file of this folder. It sees the student's logits of a chunk of
positions and says how much it loses there and what its gradient is, in a form that needs no second pass:
a coefficient on the student's own softmax, and a few entries of their own. The head is fused around it
(`fused_head.py`), so B·T·V never stands in memory.

Axes: N positions in a chunk, V vocabulary, K cached entries, S scattered entries a row.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmdistill.errors import RecipeError, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Targets:
    """What the teacher and the text say of N positions."""

    next_N: torch.Tensor  # int64, the token that follows
    ids_NK: torch.Tensor  # int64, the teacher's top K
    logp_NK: torch.Tensor  # float32, its normalised log-probs of those, at temperature 1
    tail_N: torch.Tensor  # float32, its log-mass outside those; -inf where K covers the vocabulary
    weight_NK: torch.Tensor | None = None  # float32, importance weights of drawn ids; None: the ids are the top K

    @property
    def absent_NK(self) -> torch.Tensor:
        """Entries that a position does not have, where their number varies: log-prob -inf, the first id repeated."""
        return self.logp_NK == float("-inf")

    def rows(self, rows: slice) -> Targets:
        """Some of the positions."""
        weight_NK = None if self.weight_NK is None else self.weight_NK[rows]
        return Targets(self.next_N[rows], self.ids_NK[rows], self.logp_NK[rows], self.tail_N[rows], weight_NK)


def absent_as_first(values_NK: torch.Tensor, targets: Targets) -> torch.Tensor:
    """`values_NK` with those of absent entries taken from the first, whose id they repeat: scattered, they agree."""
    return values_NK.where(~targets.absent_NK, values_NK[:, :1])


@dataclass(frozen=True)
class StudentSoftmax:
    """The student's distribution at N positions, as unnormalised exponentials; the loss may read all of it."""

    logits_NK: torch.Tensor  # float32, the student's logits of the cached ids; -inf at absent entries
    logit_next_N: torch.Tensor  # float32, its logit of the next token
    lse_N: torch.Tensor  # float32, logsumexp over the vocabulary
    lse_rest_N: torch.Tensor  # float32, logsumexp over the vocabulary less the teacher's top K


@dataclass(frozen=True)
class LossTerms:
    """A loss at N positions with its gradient: `outside_N · softmax(z)`, but at `ids_NS` it is `inside_NS`.

    What is inside stands for itself and is not added to the rest: a student that is sure of the teacher's top K has
    an `outside_N` of many thousands, and a difference of two such terms would have no digit left.
    """

    loss_N: torch.Tensor
    outside_N: torch.Tensor
    ids_NS: torch.Tensor
    inside_NS: torch.Tensor


@dataclass(frozen=True)
class LossOptions:
    """The knobs the losses share; METHODS of the paper leave them open, so the recipe sets them."""

    temperature: float = 1.0
    mass_weighted: bool = True  # the factor P on the tempered conditional term
    hinton_scaled: bool = False  # multiply the tempered term by the square of the temperature
    self_normalised: bool = False  # importance weights divided by their sum: biased, less variance


LossFunction = Callable[[StudentSoftmax, Targets, LossOptions], LossTerms]
_LOSSES: dict[str, LossFunction] = {}
_SIGNALS: dict[str, str] = {}


def loss(name: str, signals: str = "any") -> Callable[[LossFunction], LossFunction]:
    """Register a loss under `name`, the value of `loss:` in a recipe; `signals` it learns from: any, top_k, sampled."""

    def register(function: LossFunction) -> LossFunction:
        _LOSSES[name], _SIGNALS[name] = function, signals
        return function

    return register


def names() -> list[str]:
    """The names of all losses."""
    package = importlib.import_module("lmdistill.losses")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"lmdistill.losses.{module.name}")
    return sorted(_LOSSES)


def get(name: str) -> LossFunction:
    """The loss called `name`; RecipeError with the nearest name where there is none."""
    known = names()
    if name in _LOSSES:
        return _LOSSES[name]
    raise RecipeError(f"no loss is called '{name}'{nearest(name, known)}", fix=f"one of: {', '.join(known)}")


def signals_of(name: str) -> str:
    """What the loss called `name` learns from: `any` cache, or one with the teacher's `top_k`, or `sampled` ids."""
    get(name)
    return _SIGNALS[name]
