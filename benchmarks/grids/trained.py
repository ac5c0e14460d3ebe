"""Parents of benchmarks/quantize.py trained on a grid: one level stretch, with a way down at every count of steps.

A training of 50 steps goes down from its tenth on; one of 200 is the same for the first ten, and takes them over. The
figures at 50, 200 and 500 steps are those of three whole trainings, with their own decay, in 700 steps instead of 750.
`python benchmarks/quantize.py` runs them in this order; without an earlier one a training begins at its beginning.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from grids.measured import measured
from grids.parent import Figures, Parent, Piece
from grids.ways import Way, level_steps
from lmdistill.training.on_grids import START
from lmdistill.training.run import Place, train


def trainings(parent: Parent, way: Way, counts: Sequence[int]) -> dict[str, Piece]:
    """The trainings of so many steps, as pieces of work."""
    pieces, begun = {}, 0
    for place, count in enumerate(counts):
        make = partial(_trained, parent, way, counts, place)
        seconds = (count - begun) * way.step_seconds(parent.weights) + parent.forward_seconds(parent.tokens) + 15
        done = partial(shutil.rmtree, _folder(parent, way, count), ignore_errors=True)
        pieces[str(count)] = Piece(f"{way.name}/qad-{count}", make, seconds, done)
        begun = level_steps(count)
    return pieces


def _folder(parent: Parent, way: Way, count: int) -> Path:
    return parent.work / way.name / f"{count}-steps"


def _trained(parent: Parent, way: Way, counts: Sequence[int], place: int) -> Figures:
    """The parent after so many steps on its grid, its own teacher."""
    count = counts[place]
    folders = [_folder(parent, way, each) for each in counts]
    folder = folders[place]
    _linked(parent.work / way.name / START, folder / "work" / START)
    reader = parent.reader(way)
    config = way.config(count, counts)
    where = Place(parent.folder, folder / "model", folder / "work", "cpu", parent.digest)
    record = train(reader, config, where, parent.deadline)
    if place + 1 < len(counts):
        level = f"checkpoint-{level_steps(count)}"
        _linked(folder / "work" / level, folders[place + 1] / "work" / level)
    figures = measured(parent, way, folder / "model")
    return figures | {"step_tokens": record["tokens"] // record["steps"], "log": record["log"]}


def _linked(source: Path, target: Path) -> None:
    """The same files in another folder, whole or not at all; nothing where there are none, or they are there."""
    if source.exists() and not target.exists():
        unfinished = target.parent / f"unfinished-{target.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished, copy_function=os.link)
        unfinished.rename(target)
