"""Activations rounded to 8 bits as they come, one scale and zero point a token, as torchao's 8da4w has them.

Axes: … tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from lmdistill.quantization.arithmetic import divide


class _Int8PerToken(torch.autograd.Function):  # type: ignore[misc]
    """Activations to their points; the gradient as if nothing had been done."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The points; zero is always one of them. In float32, as the runtime has it, whatever the dtype around it."""
        dtype, hidden = hidden.dtype, hidden.float()
        low = hidden.amin(-1, keepdim=True).clamp_(max=0.0)
        high = hidden.amax(-1, keepdim=True).clamp_(min=0.0)
        step = divide(high - low, 255.0).clamp_(min=torch.finfo(hidden.dtype).tiny)
        zero = (-128 - (low / step).round_()).clamp_(-128, 127)
        codes = (hidden * step.reciprocal()).round_().add_(zero).clamp_(-128, 127)
        return codes.sub_(zero).mul_(step).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient at the points, for the activations."""
        return grad


def fake_quantise_activations(hidden: torch.Tensor) -> torch.Tensor:
    """Activations `[…, D]` on their tokens' 8-bit grids, with the gradient passed straight through."""
    result: torch.Tensor = _Int8PerToken.apply(hidden)
    return result
