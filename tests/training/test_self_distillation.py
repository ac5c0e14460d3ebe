"""Born-again rounds: the model of one round speaks for the next, as its cache, through the ordinary stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_toys import LENGTH, save_word_tokenizer, train_toy

from lmdistill.checkpoints import load_model
from lmdistill.errors import RecipeError
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, Planned, PreflightContext, Runtime, StageContext
from lmdistill.recipe import load_recipe
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.corpus import CorpusConfig
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.training.config import DistillConfig

STAGE = TeachStage()


def _teach(path: Path, corpus: Artefact, model: Artefact) -> Artefact:
    (path / "out").mkdir(parents=True)
    config = TeachConfig(teacher="model", k=8, shard_rows=8, batch_rows=4)
    inputs = {"corpus": [corpus], "speaker": [model]}
    ctx = StageContext(path.name, config, inputs, None, path / "out", path / "work", runtime=Runtime("cpu"))
    STAGE.verify(ctx, STAGE.run(ctx))
    return Artefact(path.name, "teach", "signals", "b" * 64, path)


@pytest.fixture(scope="module")
def first(signals: Artefact, student: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The model of the first round."""
    path = tmp_path_factory.mktemp("first")
    train_toy(path, signals, student, tokens=LENGTH * 8 * 6)
    return Artefact("distill", "distill", "model", "f" * 64, path)


@pytest.fixture(scope="module")
def second(corpus: Artefact, first: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """What it says of the corpus."""
    return _teach(tmp_path_factory.mktemp("second") / "teach", corpus, first)


def test_the_cache_holds_what_the_model_says(first: Artefact, second: Artefact) -> None:
    batch = SignalsReader(second.out).read([0, 5])
    with torch.no_grad():
        logits_RTV = load_model(first.out / "model")(torch.from_numpy(batch.tokens_RT.astype("int64"))).logits
    logp_RTK = logits_RTV.log_softmax(-1).topk(8).values
    np.testing.assert_allclose(np.exp(batch.logp_RTK), logp_RTK.exp().numpy(), atol=2e-3)


def test_a_round_on_its_predecessor_learns_from_it(second: Artefact, student: Artefact, tmp_path: Path) -> None:
    log = train_toy(tmp_path, second, student)["log"]
    assert log[-1]["kd"] < 0.7 * log[0]["kd"]


def test_the_cache_is_the_same_whatever_the_stage_is_called(
    corpus: Artefact, first: Artefact, second: Artefact, tmp_path: Path
) -> None:
    renamed = Artefact("round_7", "distill", "model", first.fingerprint, first.path)
    again = _teach(tmp_path / "other", corpus, renamed)
    assert json.loads((again.out / "signals.json").read_text())["teacher"]["source"] == "model ffffffffffff"
    assert SignalsReader(again.out).digest == SignalsReader(second.out).digest


RECIPE = """
name: rounds
teacher: some/folder
stages:
- stage: corpus
  sources: [{source: data.jsonl}]
- stage: teach
- stage: student
- stage: distill
- {stage: teach, name: again, teacher: model}
- {stage: distill, name: next, from: [student, again]}
- {stage: teach, name: named, teacher: model, from: [corpus, distill]}
"""


def test_rounds_are_wired_by_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rounds.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "rounds.yaml")
    assert recipe.entry("teach").inputs == {"corpus": ("corpus",)}
    assert recipe.entry("again").inputs == {"corpus": ("corpus",), "speaker": ("distill",)}
    assert recipe.entry("next").inputs == {"signals": ("again",), "student": ("student",)}
    assert recipe.entry("named").inputs["speaker"] == ("distill",)  # not the newest one
    assert [STAGE.uses_teacher(recipe.entry(name).config) for name in ("teach", "again")] == [True, False]


def test_a_model_that_no_stage_makes_is_missed_before_work(tmp_path: Path) -> None:
    (tmp_path / "rounds.yaml").write_text(RECIPE.replace("- stage: teach\n", "- {stage: teach, teacher: model}\n"))
    with pytest.raises(RecipeError, match="teach: needs a model"):
        load_recipe(tmp_path / "rounds.yaml")


def test_a_model_of_other_tokens_is_refused_before_work(corpus: Artefact, first: Artefact, tmp_path: Path) -> None:
    shutil.copytree(first.path, tmp_path / "other")
    save_word_tokenizer(tmp_path / "other/out/model", prefix="x")
    other = Artefact("distill", "distill", "model", "0" * 64, tmp_path / "other")

    def planned(artefact: Artefact, config: Any) -> Planned:
        return Planned(artefact.name, artefact.stage, artefact.kind, artefact.fingerprint, config, artefact=artefact)

    corpus_config = CorpusConfig.model_validate({"sources": [{"source": "data.jsonl"}]})
    inputs = {"corpus": [planned(corpus, corpus_config)], "speaker": [planned(other, DistillConfig())]}
    ctx = PreflightContext("again", TeachConfig(teacher="model", k=8), inputs, None, tmp_path)
    [problem] = STAGE.preflight(ctx)
    assert "different token maps" in problem.what


def test_who_speaks_is_in_the_fingerprint_only_where_it_is_a_model() -> None:
    assert "teacher" not in semantic(TeachConfig(), str)
    assert semantic(TeachConfig(teacher="model"), str)["teacher"] == "model"
