"""What can be known of quantized distillation before it runs: grid, widths, tied head, whether weights are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import Planned, PreflightContext
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.plan import PRESETS
from lmdistill.training.config import DistillConfig


def check_grids(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """What `quantize` asks that the student, as far as it is known, cannot do."""
    from lmdistill.deployment.planned import config_ahead
    from lmdistill.quantization.planned import folder_ahead, lies_on
    from lmdistill.quantization.wanted import wanted
    from lmdistill.training.grid_refusals import refuse_converted

    keys = ctx.config.quantize
    if keys is not None and keys.grid in PRESETS and importlib.util.find_spec("gguf") is None:
        what = f"stage '{ctx.name}': `quantize.grid: {keys.grid}` needs the package gguf"
        return [PreflightError(what, why="not installed", fix="pip install 'lmdistill[gguf]'")]
    if not ctx.inputs.get("student"):
        return []
    student = ctx.one("student")
    try:
        config = config_ahead(ctx, "student")
        if (folder := folder_ahead(student)) is not None:
            refuse_converted(folder, ctx.config)
        elif (preset := lies_on(student)) is not None:
            _refuse_planned(ctx, student, preset, config)
        if keys is not None and config is not None:
            wanted(keys, config)
    except LmdistillError as error:
        return [error]
    return []


def _refuse_planned(
    ctx: PreflightContext[DistillConfig], student: Planned, preset: str, config: Mapping[str, Any] | None
) -> None:
    """Raise PreflightError where a student that an earlier stage will put on a grid is not what this one needs."""
    from lmdistill.training.grid_refusals import refuse_own_teaching

    keys = ctx.config.quantize
    if ctx.config.lora is not None:
        raise PreflightError(
            f"stage '{ctx.name}': its student will lie on '{preset}', and a merged adapter would not",
            fix="train its weights (drop `lora`), or name the model in full precision in `from`",
        )
    if keys is None:
        return
    if preset != keys.grid:
        raise PreflightError(
            f"stage '{ctx.name}': its student will be converted: stage '{student.name}' leaves it on '{preset}'",
            why=f"`quantize.grid` is {keys.grid}, and points of one grid quantised anew are worse than either",
            fix=f"name the model in full precision in `from`, or set `quantize.grid: {preset}`",
        )
    refuse_own_teaching(keys, f"stage '{ctx.name}': its student")
    _refuse_other_keys(keys, student, config, f"stage '{ctx.name}': its student")


def _refuse_other_keys(keys: QuantizeKeys, student: Planned, config: Mapping[str, Any] | None, named: str) -> None:
    """Raise PreflightError for other places than those it was put at, and for scales that would not be found again."""
    from lmdistill.quantization.planned import folder_ahead, placed_ahead, put_by, put_there
    from lmdistill.quantization.registry import get
    from lmdistill.training.grid_refusals import lost_scales, refuse_other_places

    lain, last = placed_ahead(student, config), getattr(student.config, "quantize", None)
    if config is not None and lain is not None:
        refuse_other_places(keys, lain, config, named)
    first = put_there(student)
    if first is not None and folder_ahead(first) is None and put_by(first).share_bits and not keys.share_bits:
        raise PreflightError(
            f"{named} will have its bits shared out among its tensors",
            why=f"`quantize` asks for as many in each, and stage '{first.name}' has `share_bits`",
            fix=f"set `quantize.share_bits: {put_by(first).share_bits}` here too",
        )
    if keys.scales != "follow":
        return
    most = get(PRESETS[keys.grid].most if keys.grid in PRESETS else keys.grid)
    followed = last is not None and last.scales == "follow"
    for grid in {most} if lain is None else set(lain.on_grids().values()):
        if not (grid.searches or (followed and grid.finds_again)):
            raise lost_scales(named, keys.grid)
