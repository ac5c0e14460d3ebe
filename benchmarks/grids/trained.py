"""Parents of benchmarks/quantize.py trained on a grid, a whole training with its own way down for every count of steps.

`python benchmarks/quantize.py` runs them from the fewest steps to the most.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from grids.measured import measured
from grids.parent import Figures, Parent, Piece
from grids.ways import Way
from lmdistill.training.on_grids import START
from lmdistill.training.run import Place, train


def trainings(parent: Parent, way: Way, counts: Sequence[int]) -> dict[str, Piece]:
    """The trainings of so many steps, as pieces of work."""
    pieces = {}
    for count in counts:
        make = partial(_trained, parent, way, count)
        seconds = count * way.step_seconds(parent.weights) + parent.forward_seconds(parent.tokens) + 15
        done = partial(shutil.rmtree, _folder(parent, way, count), ignore_errors=True)
        pieces[str(count)] = Piece(f"{way.name}/qad-{count}", make, seconds, done)
    return pieces


def _folder(parent: Parent, way: Way, count: int) -> Path:
    return parent.work / way.name / f"{count}-steps"


def _trained(parent: Parent, way: Way, count: int) -> Figures:
    """The parent after so many steps on its grid, its own teacher."""
    folder = _folder(parent, way, count)
    _linked(parent.work / way.name / START, folder / "work" / START)
    reader = parent.reader(way)
    config = way.config(count)
    where = Place(parent.folder, folder / "model", folder / "work", "cpu", parent.digest)
    record = train(reader, config, where, parent.deadline)
    figures = measured(parent, way, folder / "model")
    return figures | {"step_tokens": record["tokens"] // record["steps"], "log": record["log"]}


def _linked(source: Path, target: Path) -> None:
    """The same files in another folder, whole or not at all; nothing where there are none, or they are there."""
    if source.exists() and not target.exists():
        unfinished = target.parent / f"unfinished-{target.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished, copy_function=os.link)
        unfinished.rename(target)
