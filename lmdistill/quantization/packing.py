"""Codes of a few bits into bytes and back.

Axes: N blocks, B weights in a block, Y bytes of a block, J codes that share a byte or word.
"""

from __future__ import annotations

import torch


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Bytes `[…, B / 2]` of 4-bit codes `[…, B]`: the first half in the low nibbles, the second in the high ones."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `nibbles`."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=-1)


def bit_string(codes_NB: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes `[N, Y]` of codes of 1 to 8 bits, one after the other, lowest bit first; the last byte filled with 0."""
    places = torch.arange(bits, dtype=torch.uint8, device=codes_NB.device)
    stream_NJ = ((codes_NB.unsqueeze(-1) >> places) & 1).flatten(1)
    stream_NJ = torch.nn.functional.pad(stream_NJ, (0, -stream_NJ.shape[1] % 8))
    weights_J = 1 << torch.arange(8, dtype=torch.uint8, device=codes_NB.device)
    return (stream_NJ.unflatten(1, (-1, 8)) * weights_J).sum(-1, dtype=torch.uint8)


def from_bit_string(packed_NY: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` codes a row, the reverse of `bit_string`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed_NY.device)
    stream_NJ = ((packed_NY.unsqueeze(-1) >> places) & 1).flatten(1)[:, : count * bits]
    weights_J = 1 << torch.arange(bits, dtype=torch.uint8, device=packed_NY.device)
    return (stream_NJ.unflatten(1, (count, bits)) * weights_J).sum(-1, dtype=torch.uint8)


def raw(values: torch.Tensor) -> torch.Tensor:
    """The bytes of `values` `[N]` or `[N, J]`, little-endian, as `[N, Y]`."""
    return values.reshape(len(values), -1).contiguous().view(torch.uint8)


def unraw(packed_NY: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of `dtype` in bytes `[N, Y]`: `[N]` where there is one a row."""
    values = packed_NY.contiguous().view(dtype)
    return values.squeeze(1) if values.shape[1] == 1 else values
