"""The formats a GGUF file can have, by llama.cpp's names, and which of a model's tensors will not get them.

A quantised row is cut into blocks of 32 or, for K-quants, 256 weights. Where a tensor's rows are no multiple of
that, llama.cpp quietly takes a larger type; so it does for the head, which asks for Q6_K in every 4- and 5-bit file.
Formats that are nonsense without an importance matrix (IQ1, IQ2, IQ3) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lmdistill.deployment.architectures import Architecture
from lmdistill.deployment.gguf_header import TensorInfo
from lmdistill.errors import nearest

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """One file type of llama.cpp."""

    name: str
    bits: float  # a weight, of the type most tensors get
    block: int = 1  # weights in a block of the types that most tensors get; 1: not quantised
    head_block: int = 1  # the same for the head, or for the embeddings where they are tied
    ftype: str = ""  # LLAMA_FTYPE_… of llama_model_quantize; empty: written by lmdistill itself

    @property
    def suffix(self) -> str:
        """How file names say it: `Q4_K_M`."""
        return self.name.upper()

    @property
    def quantized(self) -> bool:
        """Whether weights are put on a grid, so that logits change for good."""
        return self.block > 1


def _quantized(name: str, bits: float, block: int, head_block: int = 256) -> Format:
    return Format(name, bits, block, head_block, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("f32", 32.0),
        Format("f16", 16.0),
        Format("bf16", 16.0, ftype="LLAMA_FTYPE_MOSTLY_BF16"),
        _quantized("q8_0", 8.5, 32, head_block=32),
        _quantized("q4_0", 4.5, 32),
        _quantized("q4_1", 5.0, 32),
        _quantized("q5_0", 5.5, 32),
        _quantized("q5_1", 6.0, 32),
        _quantized("q2_k", 2.625, 256),
        _quantized("q3_k_s", 3.4375, 256),
        _quantized("q3_k_m", 3.4375, 256),
        _quantized("q3_k_l", 3.4375, 256),
        _quantized("q4_k_s", 4.5, 256),
        _quantized("q4_k_m", 4.5, 256),
        _quantized("q5_k_s", 5.5, 256),
        _quantized("q5_k_m", 5.5, 256),
        _quantized("q6_k", 6.5625, 256),
    )
}


def known_format(name: str) -> str:
    """The format's name in lower case; raises ValueError with the nearest name where there is none."""
    lower = name.lower()
    if lower not in FORMATS:
        raise ValueError(f"no GGUF format '{name}' (there are {', '.join(FORMATS)}){nearest(lower, FORMATS)}")
    return lower


def gguf_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shape of every tensor a checkpoint brings, under its GGUF name, before anything is written."""
    names = architecture.gguf_names()
    return {names[source]: architecture.written_shape(shape) for source, shape in architecture.tensors().items()}


def predicted_fallbacks(format_: Format, architecture: Architecture) -> dict[str, int]:
    """Weights of each tensor (by GGUF name) whose rows do not fit the type that `format_` wants for it."""
    if not format_.quantized:
        return {}
    shapes = gguf_shapes(architecture)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    found = {}
    for name, shape in shapes.items():
        block = format_.head_block if name == head else format_.block
        if not architecture.keeps_f32(shape) and shape[-1] % block:
            found[name] = math.prod(shape)
    return found


def weight_count(architecture: Architecture) -> int:
    """Weights of a checkpoint; a tied head counts once."""
    return sum(math.prod(shape) for shape in architecture.tensors().values())


def fallback_share(format_: Format, architecture: Architecture) -> float:
    """Share of all weights that `predicted_fallbacks` names."""
    return sum(predicted_fallbacks(format_, architecture).values()) / weight_count(architecture)


def actual_fallbacks(format_: Format, architecture: Architecture, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of the same tensors, read back from a file."""
    if not format_.quantized:
        return []
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    found = []
    for name in gguf_shapes(architecture):
        wanted = format_.head_block if name == head else format_.block
        if not architecture.keeps_f32(tensors[name].shape) and tensors[name].block != wanted:
            found.append(name)
    return sorted(found)
