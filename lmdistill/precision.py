"""The type that products are made in: what a recipe asks for, or a finer one where the processor is faster at it.

`precision: bfloat16` says how coarse weights and products may be. A CPU without instructions for it (AVX2 alone, in
many laptops) takes some eight times as long for such a product as for one in float32: there it is made in float32.
"""

from __future__ import annotations

from functools import cache


def products_in(precision: str, device: str) -> str:
    """`precision`, or float32 where that is bfloat16 and `device` is a CPU without instructions for it."""
    if precision == "bfloat16" and device.split(":")[0] == "cpu" and not _cpu_has_bfloat16():
        return "float32"
    return precision


@cache
def _cpu_has_bfloat16() -> bool:
    """Whether torch's matrix library has kernels for bfloat16 on this CPU, as torch's own compiler asks it."""
    import torch

    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
