"""Where training on a grid begins: the scales of each tensor, and for `compensated` its points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmdistill.quantization.fitting import compensated, fitted_scales
from lmdistill.quantization.grid import Grid
from lmdistill.quantization.importance import Moments, measure
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.on_grid import OnGrids, Plan
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.size import gradient_norms, shared_bits

DEFAULT_BITS = 4
_MOVED = "moved.safetensors"


def put_on_grids(
    model: Any, keys: QuantizeKeys, placement: Placement, rows: Iterable[torch.Tensor], kept: Path | None = None
) -> OnGrids:
    """Put `model` on the grids of `placement`, with the start that the keys ask for.

    `rows` are token ids `[R, T]` of training text, read only where inputs are measured. Scales that the placement
    already has stay. What was found is kept in the folder `kept`, and read from there the next time.
    """
    begun = None if kept is None else _read(model, kept)
    if begun is None:
        begun = _begin(model, keys, placement, rows, kept)
    return OnGrids(model, Plan(begun, learned=keys.scales == "learned"))


def _begin(
    model: Any, keys: QuantizeKeys, placement: Placement, rows: Iterable[torch.Tensor], kept: Path | None
) -> Placement:
    """The placement with its scales; weights are moved where the start asks for it."""
    if keys.share_bits and not placement.scales:
        rows = list(rows)
        placement = _with_shared_bits(model, keys, placement, rows)
    moments: Moments | None = None
    if not placement.scales and keys.start in ("weighted", "compensated"):
        moments = measure(model, rows, whole=keys.start == "compensated")
    scales = dict(placement.scales)
    parameters = dict(model.named_parameters())
    versions = {name: weight._version for name, weight in parameters.items()}
    for name, grid in placement.on_grids().items():
        if name not in scales and (keys.scales != "follow" or grid.searches):
            scales[name] = _scales(name, grid, parameters[name], keys, moments)
        elif name in scales and keys.scales == "follow" and not grid.searches:
            del scales[name]
    begun = placement.with_scales(scales)
    if kept is not None and (scales or keys.share_bits):
        moved = {name: weight for name, weight in parameters.items() if weight._version != versions[name]}
        _keep(begun, moved, kept)
    return begun


def _keep(begun: Placement, moved: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what training starts with; the record comes last, and without it nothing counts."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in moved.items()}, folder / _MOVED)
    begun.save(folder)


def _read(model: Any, folder: Path) -> Placement | None:
    """What was kept there, with the moved weights in the model; None where nothing was."""
    from safetensors.torch import load_file

    begun = Placement.load(folder)
    if begun is not None:
        with torch.no_grad():
            for name, weight in load_file(folder / _MOVED).items():
                model.get_parameter(name).copy_(weight)
    return begun


def _with_shared_bits(model: Any, keys: QuantizeKeys, placement: Placement, rows: Iterable[torch.Tensor]) -> Placement:
    """The places with as many bits for each tensor as its gradient on the text earns it."""
    names = list(placement.on_grids())
    parameters = dict(model.named_parameters())
    norms = gradient_norms(model, names, rows)
    weights = {name: parameters[name].numel() for name in names}
    bits = shared_bits(norms, weights, keys.bits or DEFAULT_BITS, keys.share_bits or "linear")
    options = {name: placement.options.get(name, {}) | {"bits": bits[name]} for name in names}
    return replace(placement, options=options)


def _scales(
    name: str, grid: Grid, weight: torch.Tensor, keys: QuantizeKeys, moments: Moments | None
) -> dict[str, torch.Tensor]:
    """Scales for one tensor; a layer whose inputs were not measured (embeddings, head) gets the reference's."""
    seen = moments is not None and name in moments.sums
    if keys.start == "reference" or (keys.start != "fitted" and not seen):
        return grid.start(weight)
    if moments is None:
        return fitted_scales(grid, weight)
    scales = fitted_scales(grid, weight, moments.square(name))
    if keys.start == "compensated":
        with torch.no_grad():
            weight.copy_(compensated(grid, weight, scales, moments.second(name)))
    return scales
