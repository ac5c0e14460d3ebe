"""Codes from −8 to 7, two a byte, in the orders of ExecuTorch's two readers.

Axes: I codes of a row.
"""

from __future__ import annotations

import torch


def low_first(codes_I: torch.Tensor) -> torch.Tensor:
    """Bytes `[…, I / 2]` of XNNPACK's linear layers: of two neighbours the first is in the low nibble."""
    first, second = _halves(codes_I)
    return first | (second << 4)


def high_first(codes_I: torch.Tensor) -> torch.Tensor:
    """Bytes `[…, I / 2]` of the embedding operator: of two neighbours the first is in the high nibble."""
    first, second = _halves(codes_I)
    return (first << 4) | second


def from_low_first(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `low_first`."""
    return _joined(packed & 0x0F, packed >> 4)


def from_high_first(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `high_first`."""
    return _joined(packed >> 4, packed & 0x0F)


def _halves(codes_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shifted_I = (codes_I + 8).to(torch.uint8)
    return shifted_I[..., ::2], shifted_I[..., 1::2]


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.stack((first, second), -1).flatten(-2).to(torch.int8) - 8
