"""Which tensor goes on which grid: as llama.cpp's presets decide, so that a trained file has the usual name and size.

The head, or the embeddings where they are tied to it, gets more bits than the rest; Q4_K_M also gives more to some
values and down-projections. Where rows are no whole blocks, llama.cpp takes a type of smaller blocks, and F16 where
there is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmdistill.errors import RecipeError, nearest

if TYPE_CHECKING:
    from lmdistill.deployment.architectures import Architecture

FLOATS = ("f32", "f16")  # types of a file that are no grids
_BLOCKS = {"q4_0": 32, "q4_1": 32, "q5_0": 32, "q8_0": 32, "q4_k": 256, "q6_k": 256}
_SMALLER = {"q4_k": "q5_0", "q6_k": "q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Preset:
    """One of llama.cpp's mixes."""

    most: str  # the type of most tensors
    more_bits: bool = False  # whether some values and down-projections get Q6_K


PRESETS = {
    "q4_0": Preset("q4_0"),
    "q4_1": Preset("q4_1"),
    "q5_0": Preset("q5_0"),
    "q8_0": Preset("q8_0"),
    "q4_k_m": Preset("q4_k", more_bits=True),
    "q6_k": Preset("q6_k"),
}


def grids_of_preset(name: str, architecture: Architecture) -> dict[str, str]:
    """The type of each tensor of a checkpoint, by its name there: a grid, `f32`, or `f16` where no grid fits.

    Raises RecipeError for a preset that there is not.
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise RecipeError(f"no preset is called '{name}'{nearest(name, PRESETS)}", fix=f"one of: {known}")
    names = architecture.gguf_names()
    shapes = {gguf: architecture.written_shape(architecture.tensors()[source]) for source, gguf in names.items()}
    matrices = {gguf: shape for gguf, shape in shapes.items() if not architecture.keeps_f32(shape)}
    wanted = _wanted(PRESETS[name], matrices, int(architecture.config["num_hidden_layers"]))
    found = {gguf: fitting(wanted[gguf], shape[-1]) for gguf, shape in matrices.items()}
    return {source: found.get(gguf, "f32") for source, gguf in names.items()}


def is_block_type(kind: str) -> bool:
    """Whether a grid is one of a GGUF file's types."""
    return kind in _BLOCKS


def fitting(kind: str, width: int) -> str:
    """`kind`, or what llama.cpp takes instead of it for rows of `width` weights."""
    if width % _BLOCKS[kind]:
        kind = _SMALLER.get(kind, kind)
    return kind if width % _BLOCKS[kind] == 0 else "f16"


def _wanted(preset: Preset, matrices: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, str]:
    """The type of each matrix before its width is looked at."""
    wanted = dict.fromkeys(matrices, preset.most)
    if preset.more_bits:
        values = sorted((name for name in matrices if name.endswith("attn_v.weight")), key=_layer)
        downs = sorted((name for name in matrices if name.endswith("ffn_down.weight")), key=_layer)
        more = [name for i, name in enumerate(values) if _gets_more_bits(i, len(values))]
        more += [name for i, name in enumerate(downs) if _gets_more_bits(i, layers)]
        wanted.update(dict.fromkeys(more, "q6_k"))
    head = "output.weight" if "output.weight" in matrices else "token_embd.weight"
    if preset.most != "q8_0":
        wanted[head] = "q8_0" if matrices[head][-1] % _BLOCKS[preset.most] else "q6_k"
    return wanted


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _gets_more_bits(index: int, count: int) -> bool:
    """The first and the last eighth, and every third between."""
    first, last = count // 8, 7 * count // 8
    return index < first or index >= last or (index - first) % 3 == 2


def tied_conflict(grids: Mapping[str, str], architecture: Architecture) -> str:
    """What is wrong with the grids of embeddings and head where they are one matrix; empty where nothing is."""
    head, embeddings = grids.get("lm_head.weight"), grids.get("model.embed_tokens.weight")
    if not architecture.tied or head is None or head == embeddings:
        return ""
    return f"embeddings on {embeddings} and head on {head} are one tied matrix"
