"""Which of the teacher's blocks a candidate keeps, and which of those attend: a mapping from block to operator.

A placement fits where it has the asked number of blocks and of attention, and attends only at allowed blocks. `fit`
turns any placement into one that fits by as few random changes as it needs.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from lmdistill.search.candidate import Operator

Placement = dict[int, Operator]


def spread(depth: int, attention: int, blocks: int, attention_at: Collection[int]) -> Placement:
    """Blocks evenly spread over the teacher's, attention evenly spread over the allowed ones; the same every time."""
    attending = _evenly(sorted(attention_at), attention)
    rest = [block for block in range(blocks) if block not in attending]
    placement: Placement = dict.fromkeys(attending, "attention")
    return placement | dict.fromkeys(_evenly(rest, depth - attention), "conv")


def _evenly(items: list[int], count: int) -> list[int]:
    return [items[int((index + 0.5) * len(items) / count)] for index in range(count)]


def draw(depth: int, attention: int, blocks: int, attention_at: Collection[int], rng: random.Random) -> Placement:
    """A random placement, each equally likely."""
    attending = rng.sample(sorted(attention_at), attention)
    rest = [block for block in range(blocks) if block not in attending]
    placement: Placement = dict.fromkeys(attending, "attention")
    return placement | dict.fromkeys(rng.sample(rest, depth - attention), "conv")


class Fitter:
    """Makes placements fit a number of layers and of attention layers."""

    def __init__(self, blocks: int, attention_at: Collection[int], rng: random.Random) -> None:
        self.blocks, self.attention_at, self.rng = blocks, frozenset(attention_at), rng

    def fit(self, placement: Mapping[int, Operator], depth: int, attention: int) -> Placement:
        """A placement as near to the given one as random single changes lead; attention ≤ depth is possible."""
        fitted: Placement = dict(placement)
        while len(fitted) > depth:
            del fitted[self._pick(fitted, "attention" if self._attending(fitted) > attention else "conv")]
        while len(fitted) < depth:
            self._add(fitted, attention)
        while (surplus := self._attending(fitted) - attention) != 0:
            if surplus > 0:
                fitted[self._pick(fitted, "attention")] = "conv"
            else:
                self._promote(fitted)
        return fitted

    def _attending(self, placement: Placement) -> int:
        return sum(operator == "attention" for operator in placement.values())

    def _pick(self, placement: Placement, operator: Operator) -> int:
        having = sorted(block for block, each in placement.items() if each == operator)
        return self.rng.choice(having or sorted(placement))

    def _add(self, placement: Placement, attention: int) -> None:
        unused = [block for block in range(self.blocks) if block not in placement]
        block = self.rng.choice(unused)
        wants = self._attending(placement) < attention and block in self.attention_at
        placement[block] = "attention" if wants else "conv"

    def _promote(self, placement: Placement) -> None:
        """One more attention layer: at an allowed block that convolves, else at an unused one for a convolution."""
        here = sorted(b for b, each in placement.items() if each == "conv" and b in self.attention_at)
        if not here:
            del placement[self._pick(placement, "conv")]
            here = sorted(self.attention_at - set(placement))
        placement[self.rng.choice(here)] = "attention"
