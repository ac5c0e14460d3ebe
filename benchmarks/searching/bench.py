"""What all pieces share: the artefacts of a finished run, the stage's context, the hand-made student as a candidate."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill import assets
from lmdistill.checkpoints import save_model
from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, SilentProgress, StageContext
from lmdistill.recipe import load_recipe
from lmdistill.recipe.schema import Recipe
from lmdistill.search.candidate import Candidate, Layer
from lmdistill.search.config import SearchConfig
from lmdistill.search.costs import PROFILE
from lmdistill.search.heldout import HeldOutLoss, TrainingRows
from lmdistill.search.run import World
from lmdistill.search.scored import Scored
from lmdistill.training.config import DistillConfig

FATES = {"full": "attention", "local": "conv"}
KINDS = {"corpus": "corpus", "teach": "signals", "search": "student", "distill": "model"}


def artefact(run: Path, stage: str, kind: str) -> Artefact:
    """The newest finished artefact of a stage in a run folder."""
    found = sorted(run.resolve().glob(f"[0-9]*-{stage}-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{run} has no finished '{stage}': run recipes/lfm_search.yaml first")
    digest = json.loads(found[-1].read_text()).get("fingerprint", found[-1].parent.name)
    return Artefact(stage, stage, kind, digest, found[-1].parent)


def bind(args: argparse.Namespace) -> None:
    """Tie the store to the run and to what is asked of it; raises SystemExit where it is another's."""
    asked = {name: getattr(args, name) for name in ("random", "short", "short_tokens", "heldout")}
    asked |= {stage: artefact(args.run, stage, kind).fingerprint for stage, kind in KINDS.items()}
    path = args.store / "of.json"
    if not path.exists():
        write_json(path, asked)
    elif (kept := json.loads(path.read_text())) != asked:
        unlike = ", ".join(name for name in asked if kept.get(name) != asked[name])
        raise SystemExit(f"{args.store} holds pieces of another {unlike}: name another --store, or delete it")


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
    recipe: Recipe
    corpus: Artefact
    signals: Artefact
    searched: Artefact
    distilled: Artefact
    hand: Artefact
    teacher: ModelRef

    @classmethod
    def of(cls, args: argparse.Namespace) -> Bench:
        """Read what is there; grow the hand-made student where it is not."""
        lock = args.run / "recipe.lock.yaml"
        if not lock.exists():
            raise SystemExit(f"{args.run} is no run folder: run recipes/lfm_search.yaml first")
        recipe = load_recipe(lock)
        assert recipe.teacher is not None
        teacher = assets.model_folder(recipe.teacher, SilentProgress())
        corpus, signals, searched, distilled = (artefact(args.run, *names) for names in KINDS.items())
        return cls(
            args, recipe, corpus, signals, searched, distilled, made_by_hand(args.store, corpus, teacher), teacher
        )

    @property
    def config(self) -> SearchConfig:
        """The keys that the run searched with."""
        config = self.recipe.entry("search").config
        assert isinstance(config, SearchConfig)
        return config

    @property
    def distilling(self) -> DistillConfig:
        """The keys that the run distilled the searched student with."""
        config = self.recipe.entry("distill").config
        assert isinstance(config, DistillConfig)
        return config

    def context(self) -> StageContext[SearchConfig]:
        """The stage's, with the device as the run timed it."""
        out, work = self.args.store / "out", self.args.store / "work"
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        if not (work / PROFILE).exists():
            shutil.copyfile(self.searched.out / PROFILE, work / PROFILE)
        inputs = {"signals": [self.signals], "corpus": [self.corpus]}
        return StageContext("search", self.config, inputs, self.teacher, out, work, runtime=Runtime())

    def hand_made(self) -> Candidate:
        """The student that a person chose, as a candidate."""
        plan = json.loads((self.hand.out / "student.json").read_text())["plan"]
        config = json.loads((self.hand.model().path / "config.json").read_text())
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
        """search.json of the run."""
        record: dict[str, Any] = json.loads((self.searched.out / "search.json").read_text())
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
        from lmdistill.training.run import Place, train

        folder = Path(self.args.store) / "scratch" / name
        place = Place(start, folder / "model", folder / "checkpoints", Runtime().resolve_device(), name)
        train(reader, config, place, SilentProgress())
        loss = heldout.of_folder(place.output)
        shutil.rmtree(folder)
        return loss

    def searched_shape(self) -> Candidate:
        """The winner as a candidate."""
        return Candidate.from_json(json.loads((self.searched.out / "student.json").read_text())["candidate"])


def extracted(bench: Bench, world: World, candidate: Candidate, state: Path, name: str) -> Path:
    """A model folder of a candidate with its share of a super-network's weights."""
    folder = Path(bench.args.store) / "scratch" / f"{name}-start"
    model = world.extract(Scored(candidate, {}, {}, {}), state)
    save_model(model.float().cpu(), folder, tokenizer_from=world.tokenizer)
    return folder
