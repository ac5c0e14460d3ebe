"""How much each input of a linear layer matters: moments of the activations that reach it on some text.

The mean of squares of each input is what llama.cpp calls an importance matrix; the whole second moment is what a
rounding that makes good its errors needs.

Axes: R rows, T tokens in a row, P tokens together, D inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Moments:
    """Sums over the tokens seen by each layer, by the name of its weight."""

    whole: bool  # keep `[D, D]` sums of products, not `[D]` sums of squares
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _last: tuple[torch.Tensor, torch.Tensor] | None = None  # activations and their sum: several layers see the same

    def add(self, name: str, hidden: torch.Tensor) -> None:
        """Take in activations `[…, D]`."""
        hidden_PD = hidden.detach().flatten(0, -2).float()
        if self._last is None or self._last[0] is not hidden:
            self._last = hidden, hidden_PD.T @ hidden_PD if self.whole else hidden_PD.pow(2).sum(0)
        found = self._last[1]
        self.sums[name] = found.clone() if name not in self.sums else self.sums[name].add_(found)
        self.tokens[name] = self.tokens.get(name, 0) + len(hidden_PD)

    def second(self, name: str) -> torch.Tensor:
        """The mean of products `[D, D]` of a layer's inputs."""
        return self.sums[name] / self.tokens[name]

    def square(self, name: str) -> torch.Tensor:
        """The mean square `[D]` of a layer's inputs."""
        total = self.sums[name]
        return (total.diagonal() if self.whole else total) / self.tokens[name]


@contextmanager
def watched(model: Any, moments: Moments) -> Iterator[None]:
    """Have `moments` take in what reaches the linear layers of `model`, for as long as the `with` lasts."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def see(_: Any, inputs: tuple[torch.Tensor, ...], weight: str = f"{name}.weight") -> None:
                moments.add(weight, inputs[0])

            hooks.append(module.register_forward_pre_hook(see))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(model: Any, rows: Iterable[torch.Tensor], whole: bool = False) -> Moments:
    """Moments of all linear layers of a causal LM but its head, over rows of token ids `[R, T]`, without gradient."""
    moments = Moments(whole)
    with torch.no_grad(), watched(model.model, moments):
        for ids_RT in rows:
            model.model(input_ids=ids_RT, use_cache=False)
    prefixed = Moments(whole)
    prefixed.sums = {f"model.{name}": total for name, total in moments.sums.items()}
    prefixed.tokens = {f"model.{name}": count for name, count in moments.tokens.items()}
    return prefixed
