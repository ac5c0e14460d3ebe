"""Curricula in training: every difficulty orders the rows as it says, the same rows are seen, and a resume is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_toys import LENGTH, ROWS, save_toy, train_toy

from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import LOSS, success_file
from lmdistill.curriculum.config import CurriculumConfig
from lmdistill.curriculum.difficulty import measures
from lmdistill.curriculum.order import paced_order
from lmdistill.errors import IntegrityError, LmdistillError, RecipeError
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageContext
from lmdistill.recipe import load_recipe
from lmdistill.signals.exchange.merge import merge
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.corpus import CorpusConfig
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.training.config import DistillConfig
from lmdistill.training.data import row_order

STAGE = DistillStage()
SHORT = {"tokens": LENGTH * 8 * 3}  # one epoch


@pytest.fixture(scope="module")
def other(corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The cache of a second teacher on the same rows."""
    path = tmp_path_factory.mktemp("other")
    (path / "out").mkdir()
    model = ModelRef("other", save_toy(path / "model", 3, 0.3), "9" * 64)
    config = TeachConfig(k=8, shard_rows=8, batch_rows=4)
    place = path / "out", path / "work"
    TeachStage().run(StageContext("other", config, {"corpus": [corpus]}, model, *place, runtime=Runtime("cpu")))
    return Artefact("other", "teach", "signals", "2" * 64, path)


@pytest.fixture(scope="module")
def graded(corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The corpus with success rates."""
    path = tmp_path_factory.mktemp("graded")
    shutil.copytree(corpus.out, path / "out")
    np.save(success_file(path / "out"), np.linspace(1, 0, ROWS, dtype=np.float32))
    return Artefact("corpus", "corpus", "corpus", "c" * 64, path)


def _teacher_loss(cache: Artefact) -> np.ndarray[Any, Any]:
    batch = SignalsReader(cache.out).read(slice(None))
    return -np.where((batch.flags_RT & LOSS) > 0, batch.lp_next_RT, 0).sum(1) / ((batch.flags_RT & LOSS) > 0).sum(1)


def _student_loss(cache: Artefact, student: Artefact) -> np.ndarray[Any, Any]:
    tokens_RT = torch.from_numpy(SignalsReader(cache.out).read(slice(None)).tokens_RT.astype("int64"))
    with torch.no_grad():
        logits_RTV = load_model(student.out / "model")(tokens_RT).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1), tokens_RT[:, 1:].flatten(), reduction="none")
    return losses.view(ROWS, -1).mean(1).numpy()


def _run(folder: Path, signals: Artefact, student: Artefact, **keys: Any) -> tuple[dict[str, Any], Any]:
    """(training.json, difficulties) of a run."""
    record = train_toy(folder, signals, student, **SHORT, **keys)
    return record, np.load(folder / "work/checkpoints/difficulty.npy")


def test_the_cached_teachers_loss_is_a_difficulty(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    record, found_R = _run(tmp_path, signals, student, curriculum={"buckets": 4})
    np.testing.assert_allclose(found_R, _teacher_loss(signals), rtol=1e-5)
    means = record["curriculum"]["bucket_difficulty"]
    assert means == sorted(means) and len(means) == 4


def test_the_gap_of_student_and_teacher_is_a_difficulty(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    _, found_R = _run(tmp_path, signals, student, curriculum={"difficulty": "loss_gap"})
    np.testing.assert_allclose(found_R, _student_loss(signals, student) - _teacher_loss(signals), atol=1e-4)


def test_the_chance_of_an_ensemble_to_say_the_answer_is_a_difficulty(
    signals: Artefact, other: Artefact, student: Artefact, tmp_path: Path
) -> None:
    _, found_R = _run(tmp_path, signals, student, curriculum={"difficulty": "ensemble"}, beside={"judges": [other]})
    chances = [np.exp(-_teacher_loss(cache).astype(np.float64) * (LENGTH - 1)) for cache in (signals, other)]
    np.testing.assert_allclose(found_R, -np.log((chances[0] + chances[1]) / 2), rtol=1e-5)


def test_the_success_rates_of_the_corpus_are_a_difficulty(
    signals: Artefact, graded: Artefact, student: Artefact, tmp_path: Path
) -> None:
    keys = {"curriculum": {"difficulty": "success_rate"}, "beside": {"corpus": [graded]}}
    record, found_R = _run(tmp_path, signals, student, **keys)
    np.testing.assert_allclose(found_R, np.linspace(0, 1, ROWS), atol=1e-6)
    assert record["curriculum"]["bucket_difficulty"][0] == pytest.approx(1 / 23, abs=1e-4)


def test_other_success_rates_refuse_to_resume(
    signals: Artefact, graded: Artefact, student: Artefact, tmp_path: Path
) -> None:
    keys = {**SHORT, "curriculum": {"difficulty": "success_rate"}}
    train_toy(tmp_path / "run", signals, student, **keys, beside={"corpus": [graded]})
    shutil.copytree(graded.path, tmp_path / "graded")
    np.save(success_file(tmp_path / "graded/out"), np.linspace(0, 1, ROWS, dtype=np.float32))
    changed = Artefact("corpus", "corpus", "corpus", "c" * 64, tmp_path / "graded")
    with pytest.raises(IntegrityError, match="made with other success"):
        train_toy(tmp_path / "run", signals, student, **keys, beside={"corpus": [changed]})


def test_judges_of_other_rows_are_refused(
    signals: Artefact, other: Artefact, student: Artefact, tmp_path: Path
) -> None:
    merge(tmp_path / "moved/out", [other.out, other.out])
    moved = Artefact("moved", "teach", "signals", "2" * 64, tmp_path / "moved")
    with pytest.raises(IntegrityError, match="is of other rows than"):
        train_toy(tmp_path / "run", signals, student, curriculum={"difficulty": "ensemble"}, beside={"judges": [moved]})


def test_a_curriculum_trains_on_the_rows_of_the_plain_order(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """In the order that difficulties, keys and seed give: which is what the digest in the record says."""
    import hashlib

    keys = {"curriculum": {"buckets": 3, "pacing": "root", "until": 0.5}, "seed": 7}
    record, found_R = _run(tmp_path, signals, student, **keys)
    plain_N = row_order(ROWS, ROWS, 7)
    order_N = paced_order(plain_N, found_R, CurriculumConfig.model_validate(keys["curriculum"]), 7)
    assert sorted(order_N) == sorted(plain_N)
    assert record["curriculum"]["order"] == hashlib.sha256(order_N.tobytes()).hexdigest()


def _preflight(folder: Path, signals: Planned | None = None, **keys: Any) -> list[LmdistillError]:
    inputs = {"signals": [signals]} if signals else {}
    return STAGE.preflight(PreflightContext("distill", DistillConfig.model_validate(keys), inputs, None, folder))


def test_names_that_are_not_there_are_said_before_work(tmp_path: Path) -> None:
    problems = _preflight(tmp_path, curriculum={"difficulty": "teacher_los", "pacing": "linaer"})
    assert ["did you mean 'teacher_loss'" in problems[0].what, "did you mean 'linear'" in problems[1].what] == [1, 1]


def test_a_curriculum_without_what_it_reads_is_refused_before_work(tmp_path: Path) -> None:
    config = CorpusConfig.model_validate({"sources": [{"source": "data.jsonl"}]})
    planned = Planned("text", "corpus", "corpus", "c" * 64, config)
    [problem] = _preflight(tmp_path, planned, loss="full_kl", curriculum={})
    assert "no teacher has spoken" in problem.why
    inputs = {"corpus": [planned]}
    keys = DistillConfig.model_validate({"curriculum": {"difficulty": "success_rate"}})
    [problem] = STAGE.preflight(PreflightContext("distill", keys, inputs, None, tmp_path))
    assert "needs success rates" in problem.what and "`success:`" in problem.fix


def test_the_config_knows_what_a_difficulty_needs() -> None:
    for name, measure in measures().items():
        config = CurriculumConfig(difficulty=name)
        assert (config.judged, config.graded) == (measure.needs == "judges", measure.needs == "success")


RECIPE = """
name: judged
teacher: some/folder
stages:
- stage: corpus
  sources: [{{source: data.jsonl}}]
- stage: teach
- {{stage: teach, name: second, k: 8}}
- stage: student
- stage: distill
  from: [student, teach]
  curriculum: {{difficulty: {difficulty}}}
"""


def test_a_recipe_brings_what_a_difficulty_needs(tmp_path: Path) -> None:
    def inputs(difficulty: str, text: str = RECIPE) -> Any:
        (tmp_path / "judged.yaml").write_text(text.format(difficulty=difficulty))
        return load_recipe(tmp_path / "judged.yaml").entry("distill").inputs

    plain = {"signals": ("teach",), "student": ("student",)}
    assert inputs("teacher_loss") == plain
    assert inputs("ensemble") == {**plain, "judges": ("second",)}
    assert inputs("success_rate") == {**plain, "corpus": ("corpus",)}
    with pytest.raises(RecipeError, match="needs a signals"):
        inputs("ensemble", RECIPE.replace("- {{stage: teach, name: second, k: 8}}\n", ""))


def test_a_curriculum_is_in_the_fingerprint_only_where_there_is_one() -> None:
    assert "curriculum" not in semantic(DistillConfig(), str)
    assert semantic(DistillConfig.model_validate({"curriculum": {}}), str)["curriculum"]["buckets"] == 8
