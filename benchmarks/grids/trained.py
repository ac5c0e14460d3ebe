"""Parents of benchmarks/quantize.py trained on a grid: one level stretch, with a way down at every count of steps.

A training of 50 steps goes down in its last ten; one of 200 is the same for the first 40, and takes them over. So the
figures at 50, 200 and 500 steps are those of three whole trainings, with their own decay, in 550 steps instead of 750.
`python benchmarks/quantize.py` runs them in this order; without an earlier one a training begins at its beginning.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grids.parent import Figures, Parent, Piece
from grids.ways import Way, level_steps
from lmdistill.checkpoints import load_model
from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.packed_gguf import verify_packed, write_packed_gguf
from lmdistill.evaluation.runtimes.checkpoint import CheckpointRuntime
from lmdistill.evaluation.runtimes.llama_cpp import GgufRuntime
from lmdistill.quantization.on_grid import kept_on_its_grids
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.size import sizes
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.on_grids import START
from lmdistill.training.run import Place, train


def trainings(parent: Parent, way: Way, counts: Sequence[int]) -> dict[str, Piece]:
    """The trainings of so many steps, as pieces of work."""
    pieces, begun = {}, 0
    for place, count in enumerate(counts):
        make = partial(_trained, parent, way, counts, place)
        seconds = (count - begun) * way.step_seconds(parent.weights) + parent.forward_seconds(parent.tokens) + 15
        pieces[str(count)] = Piece(f"{way.name}/qad-{count}", make, seconds)
        begun = level_steps(count)
    return pieces


def _trained(parent: Parent, way: Way, counts: Sequence[int], place: int) -> Figures:
    """The parent after so many steps on its grid, its own teacher."""
    count = counts[place]
    folders = [parent.work / way.name / f"{each}-steps" for each in counts]
    folder = folders[place]
    _linked(parent.work / way.name / START, folder / "work" / START)
    reader = SignalsReader(parent.signals(way), "train")
    config = way.config(count, counts)
    where = Place(parent.folder, folder / "model", folder / "work", "cpu", parent.digest)
    record = train(reader, config, where, parent.deadline)
    if place + 1 < len(counts):
        level = f"checkpoint-{level_steps(count)}"
        _linked(folder / "work" / level, folders[place + 1] / "work" / level)
    figures = _measured(parent, way, folder / "model")
    shutil.rmtree(folder)
    return figures | {"step_tokens": record["tokens"] // record["steps"], "log": record["log"]}


def _linked(source: Path, target: Path) -> None:
    """The same files in another folder, whole or not at all; nothing where there are none, or they are there."""
    if source.exists() and not target.exists():
        unfinished = target.parent / f"unfinished-{target.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished, copy_function=os.link)
        unfinished.rename(target)


def _measured(parent: Parent, way: Way, model: Path) -> Figures:
    """KL and loss of a trained model, and whether its file has its very weights."""
    from safetensors.torch import load_file

    placement = Placement.load(model)
    assert placement is not None
    tensors = load_file(model / "model.safetensors")
    size = {"size": sizes(tensors, placement)}
    if way.preset in FORMATS:
        target = parent.file(way, "trained")
        write_packed_gguf(model, target, placement, way.preset, name=way.name, parent="0" * 64)
        figures = {"bit_equal": True, "tensors": verify_packed(target, model), "bytes": target.stat().st_size}
        figures |= parent.scored(GgufRuntime.open(target, parent.options, exact=True))
        target.unlink()
        return figures | size
    figures = {"bit_equal": not _off_grid(tensors, placement), "tensors": len(placement.on_grids())}
    loaded = load_model(model)
    kept_on_its_grids(loaded, model)  # where activations are rounded too, that is part of the grid
    return figures | parent.scored(CheckpointRuntime(loaded, "cpu")) | size


def _off_grid(tensors: dict[str, Any], placement: Placement) -> list[str]:
    """Tensors that are not what their packed bytes stand for."""
    import torch

    found = []
    for name, grid in placement.on_grids().items():
        packed = grid.pack(grid.quantise(tensors[name], placement.scales[name]))
        if not torch.equal(grid.dequantise(grid.unpack(packed)), tensors[name]):
            found.append(name)
    return found
