"""Where a model lies, as far as the recipe and finished artefacts tell before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmdistill.pipeline.stage import Planned
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import FOLDER

if TYPE_CHECKING:
    from lmdistill.quantization.placement import Placement


def folder_ahead(model: Planned) -> Path | None:
    """The folder of a planned model whose weights are there already: made, or the checkpoint a student begins as."""
    from lmdistill.deployment.planned import checkpoint_ahead

    if model.artefact is not None:
        return model.artefact.model().path
    return checkpoint_ahead(model.config) if model.stage == "student" else None


def lies_on(model: Planned) -> str | None:
    """The grid, or llama.cpp's preset of grids, that a planned model lies on; None for full precision."""
    if (folder := folder_ahead(model)) is not None:
        record = folder / FOLDER / "grids.json"
        return str(json.loads(record.read_text("utf-8"))["preset"]) if record.exists() else None
    keys = getattr(model.config, "quantize", None)
    if keys is not None:
        return str(keys.grid)
    if model.kind != "model":
        return None
    return next((lies_on(up) for up in trained_from(model)), None)


def placed_ahead(model: Planned, config: Mapping[str, Any] | None) -> Placement | None:
    """Where a planned model with this config.json was put first, however often it was trained since; None: unknown."""
    from lmdistill.quantization.placement import Placement
    from lmdistill.quantization.wanted import wanted

    first = put_there(model)
    if first is None:
        return None
    if (folder := folder_ahead(first)) is not None:
        return Placement.load(folder)
    return None if config is None else wanted(put_by(first), config)


def put_by(first: Planned) -> QuantizeKeys:
    """The keys by which a stage puts its model on a grid; see `put_there`."""
    keys: QuantizeKeys = cast(Any, first.config).quantize
    return keys


def put_there(model: Planned) -> Planned | None:
    """The first of the models that a planned one was trained from, or it itself, to lie on a grid; None: none does."""
    earlier = next((found for up in trained_from(model) if (found := put_there(up))), None)
    return earlier or (None if lies_on(model) is None else model)


def trained_from(model: Planned) -> Iterator[Planned]:
    """The model that a stage trains on, where it has one."""
    for role in ("student", "model"):
        yield from model.inputs.get(role, ())


def in_full_precision(model: Planned) -> Planned | None:
    """The model that one on a grid was before it was put there, however often it was trained since; None: unknown."""
    for up in trained_from(model):
        if lies_on(up) is not None:
            return in_full_precision(up)
        return None if _to_be_fetched(up) else up
    return None


def _to_be_fetched(model: Planned) -> bool:
    """Whether a student begins as a checkpoint that is not here yet, so that nothing is known of where it lies."""
    return getattr(model.config, "init", "") == "checkpoint" and folder_ahead(model) is None
