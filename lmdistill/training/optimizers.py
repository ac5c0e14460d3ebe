"""Optimisers by name, the value of `optimizer:` in distill. One more is one more decorated function here.

Those in 8 bits keep their moments as blockwise quantised bytes (arXiv 2110.02861): 2 bytes a parameter instead of 8
for AdamW, 1 for Lion. Tensors below 4,096 entries and the embeddings keep theirs in float32, as the paper advises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Groups = list[dict[str, Any]]  # params, lr, weight_decay
Maker = Callable[[Groups, tuple[float, float]], "torch.optim.Optimizer"]


@dataclass(frozen=True)
class Kind:
    """An optimiser with what is known of it before it runs."""

    make: Maker
    extra: str | None  # of lmdistill, that brings what it needs
    summary: str


_KINDS: dict[str, Kind] = {}


def optimizer(name: str, extra: str | None = None) -> Callable[[Maker], Maker]:
    """Register an optimiser under `name`; `extra` is the package it needs and lmdistill's extra that brings it."""

    def register(make: Maker) -> Maker:
        _KINDS[name] = Kind(make, extra, next(iter((make.__doc__ or "").splitlines()), ""))
        return make

    return register


def kinds() -> dict[str, Kind]:
    """All optimisers by name."""
    return dict(_KINDS)


@optimizer("adamw")
def adamw(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW in float32, one fused kernel."""
    import torch

    return torch.optim.AdamW(groups, betas=betas, fused=True)


@optimizer("adamw_8bit", extra="bitsandbytes")
def adamw_8bit(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW, both moments in 8 bits."""
    import bitsandbytes

    built: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=betas)
    return built


@optimizer("paged_adamw_8bit", extra="bitsandbytes")
def paged_adamw_8bit(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW in 8 bits, whose moments move to the host's memory when the GPU's is full; without a GPU as adamw_8bit."""
    import bitsandbytes

    built: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(groups, betas=betas)
    return built


@optimizer("lion_8bit", extra="bitsandbytes")
def lion_8bit(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Lion, its one moment in 8 bits: every step has the same size, so `lr` is a tenth to a third of AdamW's."""
    import bitsandbytes

    built: torch.optim.Optimizer = bitsandbytes.optim.Lion8bit(groups, betas=betas)
    return built


def keep_embeddings_wide(model: torch.nn.Module) -> None:
    """Have bitsandbytes keep the moments of every embedding in float32: rare rows see few, uneven gradients."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
