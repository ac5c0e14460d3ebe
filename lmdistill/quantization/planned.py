"""Where a model lies, as far as the recipe and finished artefacts tell before anything runs."""

from __future__ import annotations

import json

from lmdistill.pipeline.stage import Planned
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
    return next((lies_on(up) for role in ("student", "model") for up in model.inputs.get(role, ())), None)
