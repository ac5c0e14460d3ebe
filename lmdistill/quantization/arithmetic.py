"""Float32 arithmetic as C does it, element by element, on CPU and GPU: what byte equality with llama.cpp rests on.

Axes: N blocks, B weights in a block.
"""

from __future__ import annotations

import torch

_BELOW_HALF = 0.49999997019767761  # the float32 before 0.5
_MAGIC = 12582912.0  # 1.5 · 2²³: adding it leaves the nearest integer in the low bits of the mantissa


def divide(numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> torch.Tensor:
    """The correctly rounded float32 quotient where one side is a number.

    torch turns `number / tensor` into a product with the reciprocal, and on a GPU `tensor / number` too.
    """
    like = denominator if isinstance(denominator, torch.Tensor) else numerator
    assert isinstance(like, torch.Tensor)
    top, bottom = (torch.as_tensor(side, dtype=like.dtype, device=like.device) for side in (numerator, denominator))
    return torch.div(top, bottom)


def inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 where that is zero or so small that it has no inverse in float32."""
    inverted = values.reciprocal()
    return inverted.masked_fill_(inverted.isinf(), 0.0)


def square_root(values: torch.Tensor) -> torch.Tensor:
    """The correctly rounded float32 root: torch's own is off by one in a fifth of all cases where it uses MKL."""
    return values.double().sqrt().float()


def round_half_away(values: torch.Tensor) -> torch.Tensor:
    """C's roundf for |values| < 2²²: torch rounds halves to even."""
    return values.abs().add_(_BELOW_HALF).floor_().copysign_(values)


def nearest_int(values: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rounding, int32: halves to even, and beyond 2²² or for NaN whatever the bits say."""
    return (values + _MAGIC).view(torch.int32).bitwise_and_(0x007FFFFF).sub_(0x00400000)


def first_minimum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The least value along `dim`, kept as an axis; of zeros of either sign the first."""
    low = values.amin(dim, keepdim=True)
    zero = low == 0
    if zero.any():
        first = values.gather(dim, (values == 0).to(torch.uint8).argmax(dim, keepdim=True))
        low = torch.where(zero, first, low)
    return low


def signed_extreme(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The value of the largest magnitude of a matrix along `dim`, kept as an axis; of equals the first, of zeros +0."""
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    tied = ((high == -low) & (high > 0)).squeeze(dim).nonzero().squeeze(1)
    if len(tied):  # both signs: only the order tells, and finding it for every block would take most of the time
        some = values.index_select(1 - dim, tied)
        extreme.index_copy_(1 - dim, tied, some.gather(dim, some.abs().argmax(dim, keepdim=True)))
    return extreme.add_(0.0)


def ordered_sum(terms_BN: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis from zero, one after the other, each addition rounded."""
    total = torch.zeros_like(terms_BN[0])
    for term in terms_BN.unbind():
        total.add_(term)
    return total
