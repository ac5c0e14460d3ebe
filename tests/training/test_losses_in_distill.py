"""`loss:` and its keys in the distill stage: every loss trains, a key nobody reads is named, a live teacher runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from training_toys import LENGTH, ROWS, SHAPE, save_word_tokenizer

from lmdistill.errors import LmdistillError, PreflightError, RecipeError
from lmdistill.losses import registry
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageContext
from lmdistill.stages.corpus import CorpusConfig
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.student import StudentConfig
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.training.config import DistillConfig

STAGE = DistillStage()
KEYS = {"tokens": LENGTH * 8 * 6, "batch_rows": 8, "lr": 0.2, "precision": "float32", "log_steps": 2}
TOP_K = [name for name, entry in registry.catalogue().items() if entry.signals == "top_k"]


def _train(
    folder: Path, rows: Artefact, student: Artefact, teacher: ModelRef | None = None, **keys: Any
) -> list[dict[str, float]]:
    """Train as a stage does; returns the loss curve."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    inputs = {"signals": [rows], "student": [student]}
    config = DistillConfig(**{**KEYS, **keys})
    ctx = StageContext("distill", config, inputs, teacher, folder / "out", folder / "work", runtime=Runtime("cpu", 1))
    STAGE.verify(ctx, STAGE.run(ctx))
    log: list[dict[str, float]] = json.loads((folder / "out/training.json").read_text())["log"]
    return log


def _preflight(folder: Path, teacher: ModelRef | None = None, **keys: Any) -> list[LmdistillError]:
    return STAGE.preflight(PreflightContext("distill", DistillConfig(**keys), {}, teacher, folder))


@pytest.mark.parametrize("name", TOP_K)
def test_every_loss_on_a_top_k_cache_falls(name: str, signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    log = _train(tmp_path, signals, student, loss=name, kd_weight=1.0)
    assert all(math.isfinite(line["loss"]) for line in log)
    assert log[-1]["kd"] < log[0]["kd"]


def test_options_reach_the_loss(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    for name, keys in (("js", {"js_beta": 0.1}), ("skew_kl", {"skew_alpha": 0.8}), ("bd_kd", {"bd_weight": 1.0})):
        usual = _train(tmp_path / name / "usual", signals, student, loss=name)
        other = _train(tmp_path / name / "other", signals, student, loss=name, **keys)
        assert usual[0]["kd"] != other[0]["kd"]


@pytest.mark.parametrize(
    ("keys", "named", "fix"),
    [
        ({"loss": "ce", "temperature": 2.0}, "'ce' does not read `temperature`", "decoupled_topk"),
        ({"loss": "forward_kl", "mass_weighted": False}, "'forward_kl' does not read `mass_weighted`", "decoupled"),
        ({"js_beta": 0.2}, "'decoupled_topk' does not read `js_beta`", "reads it: full_js, js"),
        ({"loss": "js", "self_normalised": True}, "'js' does not read `self_normalised`", "sampled_kd"),
    ],
)
def test_a_key_that_the_loss_does_not_read_is_named_before_work(
    keys: dict[str, Any], named: str, fix: str, tmp_path: Path
) -> None:
    [problem] = _preflight(tmp_path, **keys)
    assert named in problem.what and fix in problem.fix


def test_a_key_written_out_at_its_default_is_no_mistake(tmp_path: Path) -> None:
    """recipe.lock.yaml writes every default out, and runs like any recipe."""
    assert _preflight(tmp_path, **{**DistillConfig(loss="ce").model_dump(), "loss": "ce"}) == []


def test_an_unknown_loss_names_the_nearest_and_all_there_are(tmp_path: Path) -> None:
    [problem] = _preflight(tmp_path, loss="reverse_kll")
    assert "did you mean 'reverse_kl'" in problem.what
    assert all(name in problem.fix for name in registry.catalogue())


def test_the_keys_of_losses_leave_older_fingerprints_as_they_are() -> None:
    said = semantic(DistillConfig(), str)
    assert not {"js_beta", "skew_alpha", "bd_weight"} & set(said)
    assert semantic(DistillConfig(loss="js", js_beta=0.2), str)["js_beta"] == 0.2


def test_the_config_knows_which_loss_is_live() -> None:
    for name, entry in registry.catalogue().items():
        assert DistillConfig(loss=name).live == (entry.signals == "live")
        assert STAGE.uses_teacher(DistillConfig(loss=name)) == (entry.signals == "live")


def test_a_live_teacher_says_what_a_cache_of_the_whole_vocabulary_says(
    teacher: ModelRef, corpus: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """The same rows and steps; the cache's codes are off by their rounding."""
    (tmp_path / "signals/out").mkdir(parents=True)
    config = TeachConfig(k=SHAPE["vocab_size"], precision="float32", shard_rows=ROWS, batch_rows=8)
    place = tmp_path / "signals/out", tmp_path / "signals/work"
    TeachStage().run(StageContext("teach", config, {"corpus": [corpus]}, teacher, *place, runtime=Runtime("cpu")))
    whole = Artefact("teach", "teach", "signals", "e" * 64, tmp_path / "signals")
    cached = _train(tmp_path / "cached", whole, student, loss="forward_kl")
    live = _train(tmp_path / "live", whole, student, teacher, loss="full_kl")
    for one, other in zip(cached, live, strict=True):
        assert one["kd"] == pytest.approx(other["kd"], rel=5e-3)
        assert one["ce"] == pytest.approx(other["ce"], rel=5e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_a_cache_a_corpus_gives_the_same_curve(
    precision: str, teacher: ModelRef, corpus: Artefact, signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    from_cache = _train(tmp_path / "cache", signals, student, teacher, loss="full_kl", precision=precision)
    from_corpus = _train(tmp_path / "corpus", corpus, student, teacher, loss="full_kl", precision=precision)
    for one, other in zip(from_cache, from_corpus, strict=True):  # sums over V begin elsewhere, so last digits differ
        assert one == pytest.approx(other, rel=1e-3 if precision == "float32" else 3e-2)
    assert from_corpus[-1]["kd"] < from_corpus[0]["kd"]


def test_a_corpus_is_an_input_for_a_live_teacher_alone() -> None:
    kinds = {name: STAGE.inputs_for(DistillConfig(loss=name))[0].kinds for name in ("full_kl", "decoupled_topk")}
    assert kinds == {"full_kl": ("signals", "corpus"), "decoupled_topk": ("signals",)}


def test_a_live_teacher_of_other_tokens_is_refused_before_work(teacher: ModelRef, tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "out/tokenizer", prefix="x")
    corpus = Planned(
        "corpus",
        "corpus",
        "corpus",
        "c" * 64,
        CorpusConfig.model_validate({"sources": [{"source": "data.jsonl"}]}),
        artefact=Artefact("corpus", "corpus", "corpus", "c" * 64, tmp_path),
    )
    ctx = PreflightContext("distill", DistillConfig(loss="full_kl"), {"signals": [corpus]}, teacher, tmp_path)
    [problem] = STAGE.preflight(ctx)
    assert "different token maps" in problem.what


def test_a_live_teacher_of_other_tokens_is_refused_when_it_runs(
    teacher: ModelRef, corpus: Artefact, student: Artefact, tmp_path: Path
) -> None:
    from lmdistill.training.live_teacher import open_live

    save_word_tokenizer(tmp_path, prefix="x")
    with pytest.raises(PreflightError, match="the student and the teacher have different token maps"):
        open_live(teacher, tmp_path, "float32", "cpu", isolate=False)


def test_a_live_teacher_is_in_the_estimate(teacher: ModelRef, tmp_path: Path) -> None:
    student = Planned(
        "student", "student", "student", "d" * 64, StudentConfig(init="random", layers=2, attention_layers=1)
    )

    def estimate(loss: str) -> Any:
        inputs = {"signals": [], "student": [student]}
        return STAGE.estimate(PreflightContext("distill", DistillConfig(loss=loss), inputs, teacher, tmp_path))

    cached, live = estimate("decoupled_topk"), estimate("full_kl")
    assert live.seconds > cached.seconds and live.memory_bytes > cached.memory_bytes
    assert live.disk_bytes == cached.disk_bytes


def test_the_losses_are_listed_with_the_keys_they_read() -> None:
    losses = STAGE.choices()["loss"]
    assert set(losses) == set(registry.catalogue())
    assert losses["js"].endswith("[js_beta]") and all(len(meaning) > 20 for meaning in losses.values())


RECIPE = """
name: short
teacher: {teacher}
stages:
- stage: corpus
  sources: [{{source: data.jsonl}}]
- stage: student
- stage: distill
  loss: {loss}
"""


@pytest.mark.parametrize("teacher", ["some/folder", "null"])
def test_a_recipe_without_teach_is_whole_for_a_live_teacher_alone(teacher: str, tmp_path: Path) -> None:
    from lmdistill.recipe import load_recipe

    def load(loss: str) -> Any:
        (tmp_path / "short.yaml").write_text(RECIPE.format(loss=loss, teacher=teacher))
        return load_recipe(tmp_path / "short.yaml")

    with pytest.raises(RecipeError, match="needs a signals"):
        load("decoupled_topk")
    if teacher == "null":
        with pytest.raises(RecipeError, match="distill: needs a teacher"):
            load("full_kl")
    else:
        assert load("full_kl").entry("distill").inputs == {"signals": ("corpus",), "student": ("student",)}
