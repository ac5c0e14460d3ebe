"""Losses on cached teacher signals: what one is, and the table of those there are.

A loss is one decorated function in one file of this folder. It sees the student's logits of a chunk of
positions and says how much it loses there and what its gradient is, in a form that needs no second pass:
a coefficient on the student's own softmax, and a few entries of their own. The head is fused around it
(`fused_head.py`), so B·T·V never stands in memory.

Axes: N positions in a chunk, D hidden width, V vocabulary, K cached entries, S scattered entries a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lmdistill.errors import RecipeError, nearest
from lmdistill.modules import import_all

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher's last hidden states at N positions: its logits are made where and when a chunk needs them."""

    hidden_ND: torch.Tensor
    head_VD: torch.Tensor  # rows of real tokens only; at most as many as the student has
    bias_V: torch.Tensor | None = None

    def rows(self, rows: slice) -> LiveTeacher:
        """Some of the positions."""
        return LiveTeacher(self.hidden_ND[rows], self.head_VD, self.bias_V)

    def logits(self) -> torch.Tensor:
        """Logits `[N, V]` of these positions, in float32 or above."""
        logits_NV = self.hidden_ND @ self.head_VD.T
        logits_NV = logits_NV if self.bias_V is None else logits_NV + self.bias_V
        return logits_NV if logits_NV.dtype.itemsize >= 4 else logits_NV.float()


@dataclass(frozen=True)
class Targets:
    """What the teacher and the text say of N positions."""

    next_N: torch.Tensor  # int64, the token that follows
    ids_NK: torch.Tensor  # int64, the teacher's top K
    logp_NK: torch.Tensor  # float32, its normalised log-probs of those, at temperature 1
    tail_N: torch.Tensor  # float32, its log-mass outside those; -inf where K covers the vocabulary
    weight_NK: torch.Tensor | None = None  # float32, importance weights of drawn ids; None: the ids are the top K
    live: LiveTeacher | None = None  # the teacher itself, for losses over the whole vocabulary
    scale_2N: torch.Tensor | None = None  # float32, weights of KD and of CE at each position; None: all are 1

    @property
    def absent_NK(self) -> torch.Tensor:
        """Entries that a position does not have, where their number varies: log-prob -inf, the first id repeated."""
        return self.logp_NK == float("-inf")

    def rows(self, rows: slice) -> Targets:
        """Some of the positions."""
        weight_NK = None if self.weight_NK is None else self.weight_NK[rows]
        live = None if self.live is None else self.live.rows(rows)
        scale_2N = None if self.scale_2N is None else self.scale_2N[:, rows]
        parts = self.next_N[rows], self.ids_NK[rows], self.logp_NK[rows], self.tail_N[rows]
        return Targets(*parts, weight_NK, live, scale_2N)


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
    vocab_size: int = 0  # V: how many ids share all that mass
    logits_NV: torch.Tensor | None = (
        None  # float32, all its logits where a teacher is live; the loss may overwrite them
    )


@dataclass(frozen=True)
class LossTerms:
    """A loss at N positions with its gradient: `outside_N · softmax(z)`, but at `ids_NS` it is `inside_NS`.

    What is inside stands for itself and is not added to the rest: a student that is sure of the teacher's top K has
    an `outside_N` of many thousands, and a difference of two such terms would have no digit left. A gradient that is
    dense is given whole, and is added.
    """

    loss_N: torch.Tensor
    outside_N: torch.Tensor
    ids_NS: torch.Tensor
    inside_NS: torch.Tensor
    dense_NV: torch.Tensor | None = None


@dataclass(frozen=True)
class LossOptions:
    """The knobs the losses share; METHODS of the paper leave them open, so the recipe sets them."""

    temperature: float = 1.0
    mass_weighted: bool = True  # the factor P on the tempered conditional term
    hinton_scaled: bool = False  # multiply the tempered term by the square of the temperature
    self_normalised: bool = False  # importance weights divided by their sum: biased, less variance
    js_beta: float = 0.5  # the teacher's share of the mixture in the Jensen-Shannon divergence
    skew_alpha: float = 0.1  # the share of a skew KL's first distribution in the mixture it is held against
    bd_weight: float = 0.75  # of the KL that corrects the student's sharpness; the other one has the rest

    @property
    def kl_scale(self) -> float:
        """What a tempered KL is multiplied with."""
        return self.temperature**2 if self.hinton_scaled else 1.0


LossFunction = Callable[[StudentSoftmax, Targets, LossOptions], LossTerms]


@dataclass(frozen=True)
class Loss:
    """A loss with what is known of it before it runs."""

    function: LossFunction
    signals: str  # what it learns from: any cache, the teacher's top_k, sampled ids, or a live teacher
    options: tuple[str, ...]  # the fields of LossOptions that it reads, keys of the recipe

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return next(iter((self.function.__doc__ or "").strip().splitlines()), "")


_LOSSES: dict[str, Loss] = {}


def loss(name: str, signals: str = "any", options: tuple[str, ...] = ()) -> Callable[[LossFunction], LossFunction]:
    """Register a loss under `name`, the value of `loss:` in a recipe; `signals` and `options` are those of `Loss`."""

    def register(function: LossFunction) -> LossFunction:
        _LOSSES[name] = Loss(function, signals, options)
        return function

    return register


def catalogue() -> dict[str, Loss]:
    """All losses by name, sorted."""
    import_all("lmdistill.losses")
    return dict(sorted(_LOSSES.items()))


def entry(name: str) -> Loss:
    """The loss called `name` with what is known of it; RecipeError with the nearest name where there is none."""
    known = catalogue()
    if name in known:
        return known[name]
    raise RecipeError(f"no loss is called '{name}'{nearest(name, known)}", fix=f"one of: {', '.join(known)}")


def get(name: str) -> LossFunction:
    """The loss called `name`; RecipeError where there is none."""
    return entry(name).function


def unread_options(name: str, options: LossOptions) -> list[str]:
    """Options that are not at their default and that the loss called `name` does not read."""
    read, defaults = entry(name).options, LossOptions()
    changed = [field.name for field in fields(options) if getattr(options, field.name) != getattr(defaults, field.name)]
    return [option for option in changed if option not in read]


def signals_of(name: str) -> str:
    """What the loss called `name` learns from: `any` cache, the teacher's `top_k`, `sampled` ids, a `live` teacher."""
    return entry(name).signals
