"""What a way of computing a loss is given: made-up students, teachers and texts.

Axes: N tokens, D hidden width, V vocabulary, K cached entries, n distinct draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from lmdistill.losses.registry import LiveTeacher, Targets


@dataclass(frozen=True)
class Shape:
    """The sizes of one measurement, and the chunk of the ways that go by chunks."""

    tokens: int
    vocab: int
    width: int
    k: int
    chunk: int

    def of(self, tokens: int) -> Shape:
        """The same with another number of tokens."""
        return replace(self, tokens=tokens)


@dataclass(frozen=True)
class Case:
    """The student's last hidden states and its head, which take gradients, the targets, and a live teacher's own."""

    hidden_ND: torch.Tensor
    head_VD: torch.Tensor  # float32
    targets: Targets
    teacher: LiveTeacher | None = None  # for ways that need one; its own forward is nobody's time

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What takes gradients."""
        return [self.hidden_ND, self.head_VD]

    @property
    def live(self) -> LiveTeacher:
        """The teacher of a case that was made with one."""
        assert self.teacher is not None, "this way needs a case with a live teacher"
        return self.teacher


Way = Callable[[Case], torch.Tensor]  # → mean loss


def _targets(shape: Shape) -> Targets:
    """A made-up teacher: K distinct ids a token, a falling distribution with a tail, next tokens often among the K."""
    generator = torch.Generator().manual_seed(1)
    first_N1 = torch.randint(shape.vocab, (shape.tokens, 1), generator=generator)
    ids_NK = (first_N1 + torch.arange(shape.k) * (shape.vocab // shape.k)) % shape.vocab
    spread_NK1 = torch.randn(shape.tokens, shape.k + 1, generator=generator).mul(2).sort(-1, descending=True).values
    logp_NK1 = spread_NK1.log_softmax(-1)
    inside_N = ids_NK.gather(1, torch.randint(shape.k, (shape.tokens, 1), generator=generator))[:, 0]
    anywhere_N = torch.randint(shape.vocab, (shape.tokens,), generator=generator)
    next_N = torch.where(torch.rand(shape.tokens, generator=generator) < 0.8, inside_N, anywhere_N)
    return Targets(next_N, ids_NK, logp_NK1[:, :-1].contiguous(), logp_NK1[:, -1].contiguous())


def _states(shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states as a final norm leaves them and a head: logits with a deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(shape.tokens, shape.width, generator=generator)
    return hidden_ND, torch.randn(shape.vocab, shape.width, generator=generator) * (2 / shape.width**0.5)


def warm_up(ways: Iterable[Way], shape: Shape, live: bool) -> None:
    """One step of each way on a handful of tokens: libraries are loaded and threads are there."""
    case = case_of(Shape(8, 8 * shape.k, shape.width, shape.k, 8), torch.bfloat16, live)
    for way in ways:
        way(case).backward()


def case_of(shape: Shape, dtype: torch.dtype, live: bool = False) -> Case:
    """Hidden states in `dtype`, the head in float32; with `live`, a teacher of the same width, all in `dtype`."""
    hidden_ND, head_VD = _states(shape, 2)
    teacher = LiveTeacher(*(one.to(dtype) for one in _states(shape, 3))) if live else None
    return Case(hidden_ND.to(dtype).requires_grad_(), head_VD.requires_grad_(), _targets(shape), teacher)
