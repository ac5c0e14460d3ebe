"""The text that benchmarks/quantize.py trains on: all that the run's recipe has, not what the run had time for.

`python benchmarks/quantize.py` builds it beside its figures. Documents are split by their hash, so what is held out of
the run's corpus is held out of this one.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from signals import TEACHER

from lmdistill.assets import model_folder
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import SilentProgress, StageContext
from lmdistill.stages import load_stage


def whole_corpus(run: Path, folder: Path) -> Path:
    """The corpus of a run's recipe without its limit on training tokens; built into `folder` if it is not there."""
    out = folder / "corpus"
    if not out.exists():
        recipe = yaml.safe_load((run / "recipe.lock.yaml").read_text("utf-8"))
        keys = next(stage for stage in recipe["stages"] if stage["stage"] == "corpus")
        kept = {key: value for key, value in keys.items() if key not in ("stage", "name", "from", "train_tokens")}
        stage = load_stage("corpus")
        unfinished = folder / "corpus.unfinished"
        for place in (unfinished, folder / "corpus.work"):
            place.mkdir(parents=True, exist_ok=True)
        teacher = model_folder(TEACHER, SilentProgress())
        config = stage.Config.model_validate(kept)
        context = StageContext("corpus", config, {}, teacher, unfinished, folder / "corpus.work")
        stage.verify(context, stage.run(context))
        unfinished.rename(out)
    return out


def check_heldout(ours: Path, run: Path) -> None:
    """Raise SystemExit where the held-out text of two corpora differs."""
    one, other = (CorpusReader(folder).meta.splits for folder in (ours, run))
    differing = [name for name in other if name != "train" and one[name].digest != other[name].digest]
    if differing:
        raise SystemExit(f"the split '{differing[0]}' of {ours} is not that of {run}: remove {ours}")
