"""One of two gloo processes that train a toy super-network together; started by test_sandwich.py.

Its argument is JSON: the folders of a search that has begun, its keys, and where the training goes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lmdistill.pipeline.jobs import artefact_from_json
from lmdistill.pipeline.stage import ModelRef, Runtime, SilentProgress, StageContext
from lmdistill.search import run
from lmdistill.search.config import SearchConfig
from lmdistill.search.sandwich import Sandwich, train_supernet
from lmdistill.training.ranks import Ranks
from lmdistill.training.run import Place


def train(job: dict[str, Any], ranks: Ranks) -> None:
    """Two steps with what the parent has begun; the weights go to `job["work"]`."""
    folder, config = Path(job["begun"]), SearchConfig.model_validate(job["config"])
    inputs = {role: [artefact_from_json(one)] for role, one in job["inputs"].items()}
    teacher = ModelRef("teacher", Path(job["teacher"]), "a" * 64)
    ctx = StageContext("search", config, inputs, teacher, folder / "out", folder / "work", runtime=Runtime("cpu", 1))
    world = run.begin(ctx)
    sandwich = Sandwich(world.subs[0], world.ranking, 2, 1.0, 0)
    place = Place(world.initial, folder / "out", Path(job["work"]), "cpu", "toy", ranks=ranks)
    tokens = 2 * config.training.batch_rows * world.reader.row_tokens
    train_supernet(world.net, sandwich.candidates, world.reader, config.distilling(tokens), place, SilentProgress())


if __name__ == "__main__":
    train(json.loads(sys.argv[1]), Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])))
