"""Where the recipe wants a model's tensors to lie, and what is wrong with that, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from lmdistill.errors import PreflightError, RecipeError, nearest
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.plan import FLOATS, PRESETS, grids_of_preset, is_block_type, tied_conflict

if TYPE_CHECKING:
    from lmdistill.deployment.architectures import Architecture

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def wanted(keys: QuantizeKeys, config: Mapping[str, Any]) -> Placement:
    """The places of all tensors, without scales, for a model of this config.json.

    Raises RecipeError for a grid or a glob that names nothing, PreflightError for an architecture that is not written,
    a width that a grid cannot hold, or a tied head whose grid is not the embeddings'.
    """
    from lmdistill.deployment.architectures import architecture_of

    if keys.grid not in (choices := grid_choices()):
        raise RecipeError(
            f"no grid is called '{keys.grid}'{nearest(keys.grid, choices)}", fix=f"one of: {', '.join(choices)}"
        )
    architecture = architecture_of(config)
    preset = keys.grid in PRESETS
    grids = grids_of_preset(keys.grid, architecture) if preset else _grids_of_blocks(keys.grid, architecture)
    grids = _with_ends(grids, keys, architecture)
    for glob in keys.keep:
        found = [name for name in grids if fnmatch(name, glob)]
        if not found:
            raise RecipeError(f"`quantize.keep: {glob}` matches no tensor", fix=f"names look like {next(iter(grids))}")
        grids |= {name: _float(name, architecture) for name in found if grids[name] not in FLOATS}
    options = {name: keys.options() for name, kind in grids.items() if kind == keys.grid and keys.options()}
    placement = Placement(grids, options=options, preset=keys.grid)
    _check_widths(placement, keys, architecture)
    return placement


def grid_choices() -> dict[str, str]:
    """What `quantize.grid` can be, with what each is."""
    from lmdistill.quantization.registry import catalogue

    grids = {name: (grid.__doc__ or "").splitlines()[0] for name, grid in catalogue().items()}
    presets = {
        name: f"llama.cpp's {name.upper()}: {preset.most} and what goes with it" for name, preset in PRESETS.items()
    }
    return presets | {name: grids[name] for name in ("8da4w", "uniform", "points")}


def _float(name: str, architecture: Architecture) -> str:
    """What a tensor is where it is on no grid."""
    keeps = architecture.keeps_f32(architecture.written_shape(architecture.tensors()[name]))
    return "f32" if keeps else "f16"


def _grids_of_blocks(grid: str, architecture: Architecture) -> dict[str, str]:
    """All matrices of the blocks on one grid; embeddings and head stay in float32."""
    from lmdistill.quantization.registry import get

    get(grid)
    inner = (name for name in architecture.tensors() if name not in (EMBEDDINGS, HEAD))
    return dict.fromkeys(architecture.tensors(), "f32") | {
        name: grid for name in inner if _float(name, architecture) == "f16"
    }


def _with_ends(grids: dict[str, str], keys: QuantizeKeys, architecture: Architecture) -> dict[str, str]:
    """The grids with those of embeddings and head that the recipe names."""
    from lmdistill.quantization.registry import get

    asked = {EMBEDDINGS: keys.embeddings, HEAD: keys.head}
    named = {name: kind for name, kind in asked.items() if kind is not None}
    for kind in named.values():
        if kind not in FLOATS:
            get(kind)
    _check_family(keys)
    if conflict := tied_conflict({EMBEDDINGS: grids[EMBEDDINGS]} | named, architecture):
        raise PreflightError(
            f"a tied head with unequal grids: {conflict}",
            why="config.json says `tie_word_embeddings`",
            fix="name one grid in `quantize.embeddings` and leave `quantize.head` out, or the same in both",
        )
    return grids | {name: kind for name, kind in named.items() if name in grids}


def _check_family(keys: QuantizeKeys) -> None:
    """Raise PreflightError for ends on a grid that no file holds beside the others; what never ships may be mixed."""
    gguf = keys.grid in PRESETS
    for key, kind in (("embeddings", keys.embeddings), ("head", keys.head)):
        if kind is None or kind in FLOATS or keys.grid in ("uniform", "points"):
            continue
        if not (is_block_type(kind) if gguf else kind == keys.grid):
            others = "one of llama.cpp's grids (q8_0, q6_k, …)" if gguf else f"'{keys.grid}'"
            raise PreflightError(
                f"`quantize.{key}: {kind}` lies in no file together with grid '{keys.grid}'",
                why="a GGUF has llama.cpp's grids alone, a `.pte` has 8da4w alone",
                fix=f"name {others}, or f16, f32",
            )


def _check_widths(placement: Placement, keys: QuantizeKeys, architecture: Architecture) -> None:
    shapes = {name: architecture.written_shape(shape) for name, shape in architecture.tensors().items()}
    for name, grid in placement.on_grids().items():
        grid.check_width(shapes[name][-1], name)
    for name, kind in placement.grids.items():
        inside = name not in (EMBEDDINGS, HEAD) and not any(fnmatch(name, glob) for glob in keys.keep)
        if inside and kind == "f16":
            raise PreflightError(
                f"{name} with rows of {shapes[name][-1]} weights cannot be put on grid '{keys.grid}'",
                why="its blocks have 32 weights or 256, and that is no multiple of either",
                fix="choose a student whose widths are multiples of 32, or leave the tensor out with `quantize.keep`",
            )
