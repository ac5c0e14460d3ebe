"""Where a model's tensors lie in a `.pte`, and what of that is refused before anything runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.deployment.executorch.layouts import architecture_for_pte
from lmdistill.errors import PreflightError
from lmdistill.quantization.wanted import EMBEDDINGS, HEAD

if TYPE_CHECKING:
    from lmdistill.deployment.architectures import Architecture
    from lmdistill.deployment.formats import Format
    from lmdistill.pipeline.stage import Planned
    from lmdistill.quantization.placement import Placement

GRID = "8da4w"
EVERYTHING = "_all"  # at the end of a format's name: embeddings and head on the grid too
DEFAULT_CONTEXT = 2048  # caches are memory: 12 KB a position for 30 layers of 3 heads of 64
_GROUP = 32  # XNNPACK's groups are multiples of it


def context_of(config: Mapping[str, Any], asked: int | None) -> int:
    """Positions of the caches; raises PreflightError for more than the model knows."""
    known = int(config.get("max_position_embeddings", DEFAULT_CONTEXT))
    if asked is not None and asked > known:
        raise PreflightError(f"`context: {asked}` is longer than the {known} positions the model knows")
    return asked or min(known, DEFAULT_CONTEXT)


def quantised_places(format_name: str, architecture: Architecture) -> dict[str, str]:
    """The type of each tensor in a quantised format; raises PreflightError for a width that the grid cannot hold."""
    from lmdistill.quantization.registry import get

    everything, grid = format_name.endswith(EVERYTHING), get(GRID)
    grids = {}
    for name, shape in architecture.tensors().items():
        on_grid = len(shape) == 2 and (everything or name not in (EMBEDDINGS, HEAD))
        if on_grid:
            grid.check_width(shape[-1], name)
        grids[name] = GRID if on_grid else "f32"
    return grids


def placement_of(format_: Format, config: Mapping[str, Any], trained: Placement | None) -> Placement:
    """Where a file of this format has the tensors of a model that lies where `trained` says, if it was trained so."""
    from lmdistill.quantization.placement import Placement

    architecture = architecture_for_pte(config)
    if not format_.quantized:
        return Placement(dict.fromkeys(architecture.tensors(), "f32"))
    if trained is not None:
        return trained
    return Placement(quantised_places(format_.name, architecture), preset=GRID)


def packed_format(model: Planned) -> str:
    """The format of a model trained on 8da4w: whether its embeddings lie there too decides."""
    from lmdistill.quantization.placement import FOLDER
    from lmdistill.quantization.planned import folder_ahead, put_by, put_there

    first = put_there(model)
    assert first is not None  # it lies on 8da4w
    if (folder := folder_ahead(first)) is not None:
        embeddings = json.loads((folder / FOLDER / "grids.json").read_text("utf-8"))["tensors"][EMBEDDINGS]
    else:
        embeddings = put_by(first).embeddings
    return "pte_8da4w_all" if embeddings == GRID else "pte_8da4w"


def check_checkpoint(folder: Path) -> None:
    """Raise PreflightError where a checkpoint lies on an 8da4w grid that XNNPACK has not."""
    from lmdistill.quantization.placement import Placement

    placement = Placement.load(folder)
    for tensor, kind in (placement.grids if placement else {}).items():
        if placement is not None and kind == GRID:
            check_grid_options(placement.options.get(tensor, {}))


def check_grid_options(options: Mapping[str, Any]) -> None:
    """Raise PreflightError for groups or scales that XNNPACK does not have."""
    group, scale = options.get("group", _GROUP), options.get("scale", "bf16")
    if group % _GROUP or scale != "bf16":
        raise PreflightError(
            f"XNNPACK cannot hold grid '{GRID}' with groups of {group} and {scale} scales",
            why=f"its groups are multiples of {_GROUP}, its scales bfloat16",
            fix=f"train with `quantize: {{grid: {GRID}, group: {_GROUP}}}`",
        )


def file_bits(format_name: str, architecture: Architecture) -> float:
    """Bits of a file's weights; a tied matrix in float32 is both the embeddings' and the head's."""
    from lmdistill.deployment.targets import format_of

    quantised = format_of(format_name).quantized
    grids = quantised_places(format_name, architecture) if quantised else {}
    bits = 0.0
    for name, shape in architecture.tensors().items():
        copies = 2 if name == EMBEDDINGS and architecture.tied else 1
        bits += copies * math.prod(shape) * (4.5 if grids.get(name) == GRID else 32)
    return bits


def weight_figures(placement: Placement, config: Mapping[str, Any], *, quantised: bool) -> dict[str, Any]:
    """For deployment.json: bits a weight, weights, and the matrices that are wider than the format's name says."""
    shapes = architecture_for_pte(config).tensors()
    params = sum(map(math.prod, shapes.values()))
    packed = {name: placement.grid(name).bits_per_weight for name, kind in placement.grids.items() if kind == GRID}
    bits = sum(math.prod(shape) * packed.get(name, 32) for name, shape in shapes.items())
    wide = sorted(name for name, shape in shapes.items() if quantised and len(shape) == 2 and name not in packed)
    return {
        "bits_per_weight": round(bits / params, 4),
        "params": params,
        "fallback_tensors": wide,
        "fallback_share": round(sum(math.prod(shapes[name]) for name in wide) / params, 4),
    }
