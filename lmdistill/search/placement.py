"""Which of the teacher's blocks a candidate keeps, and which of those attend: a mapping from block to operator.

A placement fits where it has the asked number of blocks and of attention, and attends only at allowed blocks. `fit`
turns any placement into one that fits by as few random changes as it needs. Which block a change takes is a picker's
choice: by chance, or by a ranking with noise on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence

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


class Picker:
    """Which of some blocks a random change takes: each is equally likely."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def leave(self, blocks: Sequence[int]) -> int:
        """One to leave out."""
        return self.rng.choice(blocks)

    def take(self, blocks: Sequence[int]) -> int:
        """One to inherit from."""
        return self.rng.choice(blocks)

    def attend(self, blocks: Sequence[int]) -> int:
        """One that shall attend."""
        return self.rng.choice(blocks)

    def convolve(self, blocks: Sequence[int]) -> int:
        """One that shall attend no more."""
        return self.rng.choice(blocks)


class RankedPicker(Picker):
    """The block that two orders, from the cheapest to lose to the dearest, name under noise of so many places."""

    def __init__(self, gone: Sequence[int], local: Sequence[int], rng: random.Random, noise: float) -> None:
        """`gone` orders blocks as a whole, `local` as places of attention."""
        super().__init__(rng)
        self._gone = {block: place for place, block in enumerate(gone)}
        self._local = {block: place for place, block in enumerate(local)}
        self._noise = noise

    def leave(self, blocks: Sequence[int]) -> int:
        """One of the cheapest to lose."""
        return min(blocks, key=self._value(self._gone))

    def take(self, blocks: Sequence[int]) -> int:
        """One of the dearest."""
        return max(blocks, key=self._value(self._gone))

    def attend(self, blocks: Sequence[int]) -> int:
        """One of those whose attention is dearest."""
        return max(blocks, key=self._value(self._local))

    def convolve(self, blocks: Sequence[int]) -> int:
        """One of those whose attention is cheapest to lose."""
        return min(blocks, key=self._value(self._local))

    def _value(self, places: Mapping[int, int]) -> Callable[[int], float]:
        return lambda block: places[block] + self.rng.gauss(0, self._noise)


class Fitter:
    """Makes placements fit a number of layers and of attention layers."""

    def __init__(self, blocks: int, attention_at: Collection[int], pick: Picker) -> None:
        self.blocks, self.attention_at, self.pick = blocks, frozenset(attention_at), pick

    def fit(self, placement: Mapping[int, Operator], depth: int, attention: int) -> Placement:
        """A placement as near to the given one as random single changes lead; attention ≤ depth is possible."""
        fitted: Placement = dict(placement)
        while len(fitted) > depth:
            operator: Operator = "attention" if self._attending(fitted) > attention else "conv"
            del fitted[self.pick.leave(self._having(fitted, operator))]
        while len(fitted) < depth:
            self._add(fitted, attention)
        while (surplus := self._attending(fitted) - attention) != 0:
            if surplus > 0:
                fitted[self.pick.convolve(self._having(fitted, "attention"))] = "conv"
            else:
                self._promote(fitted)
        return fitted

    def _attending(self, placement: Placement) -> int:
        return sum(operator == "attention" for operator in placement.values())

    def _having(self, placement: Placement, operator: Operator) -> list[int]:
        """The blocks with this operator, or all where there is none."""
        return sorted(block for block, each in placement.items() if each == operator) or sorted(placement)

    def _add(self, placement: Placement, attention: int) -> None:
        unused = [block for block in range(self.blocks) if block not in placement]
        block = self.pick.take(unused)
        wants = self._attending(placement) < attention and block in self.attention_at
        placement[block] = "attention" if wants else "conv"

    def _promote(self, placement: Placement) -> None:
        """One more attention layer: at an allowed block that convolves, else at an unused one for a convolution."""
        here = sorted(b for b, each in placement.items() if each == "conv" and b in self.attention_at)
        if not here:
            del placement[self.pick.leave(self._having(placement, "conv"))]
            here = sorted(self.attention_at - set(placement))
        placement[self.pick.attend(here)] = "attention"
