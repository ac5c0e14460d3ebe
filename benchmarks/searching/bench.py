"""What all pieces share: the artefacts of a finished run, the stage's context, the hand-made student as a candidate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill import assets
from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, SilentProgress, StageContext
from lmdistill.recipe import load_recipe
from lmdistill.search.candidate import Candidate, Layer
from lmdistill.search.config import SearchConfig
from lmdistill.search.heldout import HeldOutLoss, TrainingRows
from lmdistill.search.space import Space
from lmdistill.training.config import DistillConfig

FATES = {"full": "attention", "local": "conv"}
KEPT_BY_HAND = ("decode_tps >= {decode_tps:.6g}", "ttft_ms <= {ttft_ms:.6g}", "ram_mb <= {ram_mb:.6g}")


def artefact(run: Path, stage: str, kind: str) -> Artefact:
    """The newest finished artefact of a stage in a run folder."""
    found = sorted(run.resolve().glob(f"[0-9]*-{stage}-*"))
    if not found:
        raise SystemExit(f"{run} has no finished '{stage}': run recipes/lfm_small.yaml, or name another --run")
    digest = json.loads((found[-1] / "manifest.json").read_text()).get("fingerprint", found[-1].name)
    return Artefact(stage, stage, kind, digest, found[-1])


def made_by_hand(store: Path, corpus: Artefact, teacher: ModelRef) -> Artefact:
    """The student of a person's shape, grown by the `student` stage of recipes/lfm_qad.yaml, once."""
    recipe = next(entry for entry in load_recipe("lfm_qad").entries if entry.stage.name == "student")
    folder, unfinished = store / "hand-made", store / "hand-made.unfinished"
    if not folder.exists():
        out, work = unfinished / "out", unfinished / "work"
        for place in (out, work):
            place.mkdir(parents=True, exist_ok=True)
        inputs = {"corpus": [corpus]}
        ctx = StageContext("student", recipe.config, inputs, teacher, out, work, runtime=Runtime())
        recipe.stage.verify(ctx, recipe.stage.run(ctx))
        unfinished.rename(folder)
    return Artefact("student", "student", "student", "hand-made", folder)


@dataclass(frozen=True)
class Bench:
    """One benchmark run."""

    args: argparse.Namespace
    corpus: Artefact
    signals: Artefact
    student: Artefact
    teacher: ModelRef
    config: SearchConfig  # without budgets

    @classmethod
    def of(cls, args: argparse.Namespace) -> Bench:
        """Read what is there."""
        recipe = load_recipe("lfm_search")
        assert recipe.teacher is not None
        teacher = assets.model_folder(recipe.teacher, SilentProgress())
        keys = next(entry.config for entry in recipe.entries if entry.stage.name == "search").model_dump(mode="json")
        config = SearchConfig.model_validate({**_laid_over(keys, args.keys), "budgets": []})
        corpus, signals = (artefact(args.run, *names) for names in (("corpus", "corpus"), ("teach", "signals")))
        return cls(args, corpus, signals, made_by_hand(args.store, corpus, teacher), teacher, config)

    @property
    def folder(self) -> Path:
        """The search's own."""
        return Path(self.args.store) / "search"

    def context(self, config: SearchConfig) -> StageContext[SearchConfig]:
        """The stage's, resuming from what is there."""
        out, work = self.folder / "out", self.folder / "work"
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        inputs = {"signals": [self.signals], "corpus": [self.corpus]}
        return StageContext("search", config, inputs, self.teacher, out, work, runtime=Runtime())

    def budgeted(self) -> StageContext[SearchConfig]:
        """The context with the budgets that the hand-made student keeps, by the latency model."""
        from lmdistill.search.costs import open_device

        plain = self.context(self.config)
        teacher = json.loads((self.teacher.path / "config.json").read_text())
        space = Space(self.config.space, teacher, self.config.timing.format)
        figures = open_device(self.config, space, plain.out, plain.work, plain.progress).figures(self.hand_made())
        budgets = [text.format(**figures) for text in KEPT_BY_HAND]
        return self.context(SearchConfig.model_validate({**self.config.model_dump(mode="json"), "budgets": budgets}))

    def hand_made(self) -> Candidate:
        """The student that a person chose, as a candidate."""
        plan = json.loads((self.student.out / "student.json").read_text())["plan"]
        config = json.loads((self.student.model().path / "config.json").read_text())
        heads = config["num_attention_heads"]
        return Candidate(
            architecture=config["model_type"],
            layers=tuple(Layer(block, FATES[fate]) for block, fate in enumerate(plan) if fate in FATES),  # type: ignore[arg-type]
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config["hidden_size"] // heads,
            kernel=config["conv_L_cache"],
            vocab_size=config["vocab_size"],
        )

    def found(self) -> dict[str, Any]:
        """search.json of the search."""
        record: dict[str, Any] = json.loads((self.folder / "out" / "search.json").read_text())
        return record

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part of a piece, made once."""
        path = Path(self.args.store) / "parts" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, make())
        part: dict[str, Any] = json.loads(path.read_text())
        return part

    def trained(
        self, name: str, start: Path, config: DistillConfig, reader: TrainingRows, heldout: HeldOutLoss
    ) -> dict[str, float]:
        """The held-out loss of a model folder after a distillation, which is dropped then."""
        import shutil

        from lmdistill.training.run import Place, train

        folder = Path(self.args.store) / "scratch" / name
        place = Place(start, folder / "model", folder / "checkpoints", Runtime().resolve_device(), name)
        train(reader, config, place, SilentProgress())
        loss = heldout.of_folder(place.output)
        shutil.rmtree(folder)
        return loss


def _laid_over(keys: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`keys` with `others` in their place, inside nested keys too."""
    merged = dict(keys)
    for name, value in others.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _laid_over(merged[name], value) if both else value
    return merged
