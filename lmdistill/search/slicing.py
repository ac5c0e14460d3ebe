"""Which part of each of a super-network's tensors a candidate is made of: leading units, whole heads, last taps.

One table says what the axes of every tensor count. The same table serves to put units in their order of importance
once, and to take a candidate's part of them ever after.

Axes: D hidden width, F width inside the MLP, Q query heads × head width, K key heads × head width, C channels of a
convolution, T its taps; "3C" stands for the three projections of a convolution, one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lmdistill.search.candidate import Candidate

Part: TypeAlias = slice | torch.Tensor | None  # None: all of the axis
Parts = Mapping[str, Part]

AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, "D"),
    "model.norm.weight": ("D",),
    "embedding_norm.weight": ("D",),
    "operator_norm.weight": ("D",),
    "ffn_norm.weight": ("D",),
    "input_layernorm.weight": ("D",),
    "post_attention_layernorm.weight": ("D",),
    "feed_forward.w1.weight": ("F", "D"),
    "feed_forward.w3.weight": ("F", "D"),
    "feed_forward.w2.weight": ("D", "F"),
    "mlp.gate_proj.weight": ("F", "D"),
    "mlp.up_proj.weight": ("F", "D"),
    "mlp.down_proj.weight": ("D", "F"),
    "self_attn.q_proj.weight": ("Q", "D"),
    "self_attn.k_proj.weight": ("K", "D"),
    "self_attn.v_proj.weight": ("K", "D"),
    "self_attn.out_proj.weight": ("D", "Q"),
    "self_attn.o_proj.weight": ("D", "Q"),
    "self_attn.q_layernorm.weight": (None,),
    "self_attn.k_layernorm.weight": (None,),
    "conv.in_proj.weight": ("3C", "D"),
    "conv.conv.weight": ("C", None, "T"),
    "conv.out_proj.weight": ("D", "C"),
}


def axes_of(name: str) -> tuple[str | None, ...]:
    """What the axes of the tensor with this name count; StopIteration for a tensor that no candidate has."""
    return next(axes for suffix, axes in AXES.items() if name.endswith(suffix))


def take(tensor: torch.Tensor, axes: tuple[str | None, ...], parts: Parts) -> torch.Tensor:
    """The parts of a tensor, differentiable; the tensor itself where it is taken whole."""
    for dim, axis in enumerate(axes):
        part = parts.get("C" if axis == "3C" else axis) if axis else None
        if part is None:
            continue
        if axis == "3C":
            tensor = _one_axis(tensor.unflatten(dim, (3, -1)), dim + 1, part).flatten(dim, dim + 1)
        else:
            tensor = _one_axis(tensor, dim, part)
    return tensor


def _one_axis(tensor: torch.Tensor, dim: int, part: slice | torch.Tensor) -> torch.Tensor:
    if isinstance(part, slice):
        return tensor.narrow(dim, part.start, part.stop - part.start)
    return tensor.index_select(dim, part.to(tensor.device))


@dataclass(frozen=True)
class Full:
    """The sizes of a super-network, of which candidates have the same or less."""

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    kernel: int


def parts_of(candidate: Candidate, full: Full) -> dict[str, Part]:
    """What a candidate takes of each axis."""
    heads = kept_heads(candidate.heads, candidate.kv_heads, full.heads, full.kv_heads)
    all_heads = heads == list(range(full.heads))
    return {
        "D": _leading(candidate.hidden_size, full.hidden_size),
        "F": _leading(candidate.intermediate_size, full.intermediate_size),
        "Q": None if all_heads else rows_of_heads(heads, full.head_dim),
        "K": _leading(candidate.kv_heads * full.head_dim, full.kv_heads * full.head_dim),
        "C": _leading(candidate.hidden_size, full.hidden_size),
        # A tap's place counts from the newest position, so the oldest go first.
        "T": None if candidate.kernel == full.kernel else slice(full.kernel - candidate.kernel, full.kernel),
    }


def _leading(size: int, full: int) -> slice | None:
    return None if size == full else slice(0, size)


def rows_of_heads(heads: list[int], head_dim: int) -> torch.Tensor:
    """The rows of whole heads in a projection, rotary pairs and all."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def kept_heads(heads: int, kv_heads: int, full_heads: int, full_kv_heads: int) -> list[int]:
    """The query heads of a narrower attention, group by group of its leading key heads.

    Each key head keeps the first of its own queries. Where its groups are larger than they were, it takes in queries
    of key heads that are gone, the most important first, in turn.
    """
    before, now = full_heads // full_kv_heads, heads // kv_heads
    own = min(before, now)
    orphans = [group * before + slot for slot in range(before) for group in range(kv_heads, full_kv_heads)]
    found = []
    for group in range(kv_heads):
        found += [group * before + slot for slot in range(own)]
        found += orphans[group::kv_heads][: now - own]
    return found
