"""Where a model lies, as far as the recipe and finished artefacts tell before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lmdistill.pipeline.stage import Planned
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import FOLDER


def lies_on(model: Planned) -> str | None:
    """The grid, or llama.cpp's preset of grids, that a planned model lies on; None for full precision."""
    if model.artefact is not None:
        record = model.artefact.model().path / FOLDER / "grids.json"
        return str(json.loads(record.read_text("utf-8"))["preset"]) if record.exists() else None
    keys = getattr(model.config, "quantize", None)
    if keys is not None:
        return str(keys.grid)
    if model.kind != "model":
        return None
    return next((lies_on(up) for up in trained_from(model)), None)


def put_there_by(model: Planned) -> QuantizeKeys | None:
    """The keys of the stage that put a planned model on its grid, however often it was trained since; None for none."""
    earlier = next((found for up in trained_from(model) if (found := put_there_by(up))), None)
    keys: QuantizeKeys | None = getattr(model.config, "quantize", None)
    return earlier or keys


def trained_from(model: Planned) -> Iterator[Planned]:
    """The model that a stage trains on, where it has one."""
    for role in ("student", "model"):
        yield from model.inputs.get(role, ())


def in_full_precision(model: Planned) -> Planned | None:
    """The model that one on a grid was before it was put there, however often it was trained since."""
    for up in trained_from(model):
        return up if lies_on(up) is None else in_full_precision(up)
    return None
