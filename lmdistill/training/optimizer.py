"""AdamW whose step is relative to each tensor's own size, and the parameters that are left as they are.

A grown student's tensors differ in scale by orders of magnitude (queries scaled into the linear range of their
norm, a residual stream scaled up). Adam's step has the same size for all of them; measured against the tensor's
root mean square at the start, it does not change when a layer is rescaled without changing what it computes.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import torch

from lmdistill.errors import LmdistillError
from lmdistill.training import optimizers


def freeze(model: torch.nn.Module, patterns: list[str]) -> int:
    """Stop training parameters whose name matches a glob; how many entries that is.

    Raises LmdistillError for a glob that matches nothing.
    """
    frozen = 0
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise LmdistillError(
                f"`freeze: {pattern}` matches no parameter of the student",
                fix=f"names look like: {', '.join(names[:3])} …",
            )
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def step_sizes(model: torch.nn.Module, lr: float, relative: bool) -> dict[str, float]:
    """The learning rate of every trained parameter by name; relative: `lr` × its root mean square (1 if it is zero).

    A parameter that has an `own_lr` (what is learned beside the student) has that; one with a `measure` (what begins
    at zero in an adapter) has that in place of its root mean square.
    """
    sizes = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rms = parameter.detach().float().pow(2).mean().sqrt().item() if relative else 1.0
            rms = getattr(parameter, "measure", rms) if relative else rms
            sizes[name] = getattr(parameter, "own_lr", lr * (rms or 1.0))
    return sizes


def build(
    model: torch.nn.Module,
    sizes: dict[str, float],
    weight_decay: float,
    betas: tuple[float, float],
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """The optimiser called `kind` with one group a step size; matrices decay; norms, taps and scales do not."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in sizes:
            decay = weight_decay if parameter.ndim == 2 and not getattr(parameter, "no_decay", False) else 0.0
            groups.setdefault((sizes[name], decay), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": size, "weight_decay": decay} for (size, decay), parameters in groups.items()
    ]
    chosen = optimizers.kinds()[kind]
    if chosen.extra == "bitsandbytes":
        optimizers.keep_embeddings_wide(model)
    return chosen.make(described, betas)
