"""Which blocks a student keeps, and which of them keep their attention: greedy, by measured KL to the teacher.

A plan says of each of the teacher's blocks FULL, LOCAL (its operator is switched off here, a short convolution
will stand in for it) or GONE. Every step tries the most promising changes of one block on real text and takes
the one that costs least. The costs of the first round rank all blocks; later rounds try the `width` cheapest.

Axes: B rows, T positions, D hidden width, N = B·T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from lmdistill.students import blocks

Fate = Literal["full", "local", "gone"]
Report = Callable[[int, int, float], None]  # steps done, steps in all, KL


class PlanScorer:
    """KL to the unpruned model, in nats a token, of a model whose blocks have the fates of a plan."""

    def __init__(self, model: Any, tokens_BT: torch.Tensor) -> None:
        """Keep the unpruned model's log-probs on `tokens_BT` as the reference."""
        self.model = model
        self.layers = list(model.model.layers)
        with torch.inference_mode():
            self._inputs = [blocks.embed(model, tokens_BT)]
            self._rotary = blocks.positions(model, self._inputs[0])
            self._base: list[Fate] = ["full"] * len(self.layers)
            self._advance(0)
            logits_BTV = blocks.logits(model, self._inputs[-1])
            self._reference = blocks.KlReference(logits_BTV.flatten(0, 1))

    def _step(self, index: int, fate: Fate, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if fate == "gone":
            return hidden_BTD
        block = self.layers[index]
        if fate == "full":
            return blocks.run_block(block, hidden_BTD, self._rotary)
        return hidden_BTD + block.feed_forward(block.ffn_norm(hidden_BTD))

    def _advance(self, start: int) -> None:
        """Recompute the hidden states of the base plan from block `start` on."""
        del self._inputs[start + 1 :]
        for index in range(start, len(self.layers)):
            self._inputs.append(self._step(index, self._base[index], self._inputs[-1]))

    def adopt(self, plan: list[Fate]) -> None:
        """Make `plan` the base whose hidden states are kept, so that changes to it are cheap to score."""
        changed = [i for i, (old, new) in enumerate(zip(self._base, plan, strict=True)) if old != new]
        self._base = list(plan)
        if changed:
            with torch.inference_mode():
                self._advance(changed[0])

    def score(self, plan: list[Fate]) -> float:
        """Mean KL of `plan`, which may differ from the base anywhere."""
        changed = [i for i, (old, new) in enumerate(zip(self._base, plan, strict=True)) if old != new]
        start = changed[0] if changed else len(self.layers)
        with torch.inference_mode():
            hidden_BTD = self._inputs[start]
            for index in range(start, len(self.layers)):
                hidden_BTD = self._step(index, plan[index], hidden_BTD)
            return self._reference.mean_kl(blocks.logits(self.model, hidden_BTD).flatten(0, 1))


def greedy(scorer: PlanScorer, plan: list[Fate], fate: Fate, count: int, width: int, report: Report) -> list[Fate]:
    """`plan` with `count` more of its FULL blocks given `fate`, one at a time, the least costly first."""
    changed = greedy_order(scorer, plan, fate, count, width, report)
    return [fate if index in changed else now for index, now in enumerate(plan)]


def greedy_order(scorer: PlanScorer, plan: list[Fate], fate: Fate, count: int, width: int, report: Report) -> list[int]:
    """The `count` FULL blocks of `plan` that are given `fate` one after the other, in that order."""
    plan, order = list(plan), []
    scorer.adopt(plan)
    known: dict[int, float] = {}
    for step in range(count):
        full = [i for i, f in enumerate(plan) if f == "full"]
        tried = full if step == 0 else sorted(full, key=lambda i: (known[i], i))[:width]
        for index in tried:
            known[index] = scorer.score([fate if i == index else f for i, f in enumerate(plan)])
        best = min(tried, key=lambda i: (known[i], i))
        plan[best] = fate
        order.append(best)
        scorer.adopt(plan)
        report(step + 1, count, known[best])
    return order
