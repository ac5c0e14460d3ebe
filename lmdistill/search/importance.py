"""How important each unit of a teacher is, by what it gives on while it reads text (Minitron, arXiv 2407.14679).

A unit's score is the mean of its activation's size over the positions of a row, and the root mean square of that over
rows. Units: channels of the residual stream (after each norm, summed over all of them), channels inside an MLP, and
heads (the length of what they give to the output projection).

Axes: L layers, B rows, T positions, D hidden width, F width inside the MLP, H query heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lmdistill.precision import products_in
from lmdistill.students import blocks

_INNER, _OUTER = ("w2", "down_proj"), ("out_proj", "o_proj")
_NORMS = ("operator_norm", "ffn_norm", "input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Importance:
    """Scores of a model's units; the larger the more important."""

    hidden_D: torch.Tensor
    inner_LF: torch.Tensor
    heads_LH: torch.Tensor


def named_child(module: Any, names: tuple[str, ...]) -> Any:
    """The child that an architecture calls by one of these names."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


class _Sums:
    """Squares of means over positions, summed over rows."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0

    def add(self, activation_BTX: torch.Tensor) -> None:
        self.total = self.total + activation_BTX.detach().float().abs().mean(1).pow(2).sum(0)

    def root(self, rows: int) -> torch.Tensor:
        assert isinstance(self.total, torch.Tensor)
        return (self.total / rows).sqrt()


def measure(model: Any, tokens_RT: torch.Tensor, rows_at_once: int, precision: str) -> Importance:
    """The importance of a Llama-like or all-attention Lfm2 model's units on the rows of a text."""
    layers, heads = list(model.model.layers), model.config.num_attention_heads
    hidden, inner, outer = [], [_Sums() for _ in layers], [_Sums() for _ in layers]
    handles = []
    for norm in [
        *(getattr(layer, n) for layer in layers for n in _NORMS if hasattr(layer, n)),
        blocks.final_norm(model),
    ]:
        hidden.append(_Sums())
        handles.append(norm.register_forward_hook(_keep_output(hidden[-1])))
    for place, layer in enumerate(layers):
        mlp = named_child(layer, ("feed_forward", "mlp"))
        handles.append(named_child(mlp, _INNER).register_forward_pre_hook(_keep_input(inner[place].add)))
        projection = named_child(layer.self_attn, _OUTER)
        handles.append(projection.register_forward_pre_hook(_keep_input(_by_head(outer[place], heads))))
    device = tokens_RT.device.type
    half = products_in(precision, device) == "bfloat16"
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
        for start in range(0, len(tokens_RT), rows_at_once):
            model.model(tokens_RT[start : start + rows_at_once], use_cache=False)
    for handle in handles:
        handle.remove()
    rows = len(tokens_RT)
    return Importance(
        torch.stack([sums.root(rows) for sums in hidden]).sum(0).clone(),
        torch.stack([sums.root(rows) for sums in inner]).clone(),
        torch.stack([sums.root(rows) for sums in outer]).clone(),
    )


def _by_head(sums: _Sums, heads: int) -> Callable[[torch.Tensor], None]:
    return lambda mixed_BTD: sums.add(mixed_BTD.unflatten(-1, (heads, -1)).float().norm(dim=-1))


def _keep_output(sums: _Sums) -> Callable[..., None]:
    return lambda module, args, out: sums.add(out)


def _keep_input(add: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    return lambda module, args: add(args[0])


def order_of(scores_X: torch.Tensor) -> torch.Tensor:
    """Units from the most to the least important; the earlier one first where two are equal."""
    return torch.argsort(scores_X, descending=True, stable=True)


def head_order(scores_H: torch.Tensor, kv_heads: int) -> tuple[list[int], list[int]]:
    """(query heads, key heads) in their order: groups by the sum of their queries, queries within their group."""
    scores_KG = scores_H.unflatten(0, (kv_heads, -1))
    groups = order_of(scores_KG.sum(1)).tolist()
    size = scores_KG.shape[1]
    queries = [group * size + slot for group in groups for slot in order_of(scores_KG[group]).tolist()]
    return queries, groups
