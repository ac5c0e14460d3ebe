"""The text that benchmarks/quantize.py trains on, and what a parent says of it.

`python benchmarks/quantize.py` builds both beside its figures. It is the text of the run's recipe, of which the run
itself had no time for all, in shorter rows, so that a step can be small. Documents are split by their hash, so what is
held out of the run's corpus is held out of this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from signals import TEACHER

from lmdistill.assets import model_folder
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import Artefact, ModelRef, Progress, SilentProgress, StageContext
from lmdistill.stages import load_stage


def training_corpus(run: Path, folder: Path, row_tokens: int, tokens: int) -> Path:
    """So many tokens of the text of a run's recipe, in rows of `row_tokens`; built into `folder` if not there."""
    recipe = yaml.safe_load((run / "recipe.lock.yaml").read_text("utf-8"))
    keys = next(stage for stage in recipe["stages"] if stage["stage"] == "corpus")
    kept = {key: value for key, value in keys.items() if key not in ("stage", "name", "from")}
    kept |= {"sequence_length": row_tokens, "train_tokens": -(-tokens // row_tokens) * row_tokens}
    return _staged("corpus", kept, {}, model_folder(TEACHER, SilentProgress()), folder, SilentProgress())


def captured(corpus: Path, parent: ModelRef, keys: dict[str, Any], folder: Path, progress: Progress) -> Path:
    """The parent's own predictions of the training text, as `teach` keeps them; goes on where it was stopped."""
    given = {"corpus": [Artefact("corpus", "corpus", "corpus", "c" * 64, corpus.parent)]}
    return _staged("teach", keys, given, parent, folder, progress)


def _staged(
    name: str,
    keys: dict[str, Any],
    inputs: dict[str, list[Artefact]],
    teacher: ModelRef,
    folder: Path,
    progress: Progress,
) -> Path:
    """What a stage makes, in `folder`/out; there only when it is whole and verified."""
    out, unfinished = folder / "out", folder / "unfinished"
    if not out.exists():
        stage = load_stage(name)
        for place in (unfinished, folder / "work"):
            place.mkdir(parents=True, exist_ok=True)
        config = stage.Config.model_validate(keys)
        context = StageContext(name, config, inputs, teacher, unfinished, folder / "work", progress=progress)
        stage.verify(context, stage.run(context))
        unfinished.rename(out)
    return out


def check_heldout(ours: Path, run: Path) -> None:
    """Raise SystemExit where the held-out text of two corpora differs, in whatever rows it lies."""
    one, other = CorpusReader(ours), CorpusReader(run)
    for name in (name for name in other.meta.splits if name != "train"):
        first_T, second_T = (corpus.split(name).tokens_RT.reshape(-1) for corpus in (one, other))
        shared = min(len(first_T), len(second_T))
        if not shared or (first_T[:shared] != second_T[:shared]).any():
            raise SystemExit(f"the split '{name}' of {ours} is not that of {run}: remove {ours.parent}")
