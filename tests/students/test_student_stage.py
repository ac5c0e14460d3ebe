"""The student stage: what it refuses before work, and students from random and from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import DOC_START, LOSS, CorpusMeta, SplitMeta, tokens_digest
from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import (
    Artefact,
    ModelRef,
    Planned,
    PreflightContext,
    Runtime,
    StageConfig,
    StageContext,
)
from lmdistill.stages.student import StudentConfig, StudentStage

STAGE = StudentStage()


@pytest.fixture(scope="module")
def teacher(toy_llama: Callable[..., Path]) -> ModelRef:
    return ModelRef("teacher", toy_llama(), "a" * 64)


@pytest.fixture(scope="module")
def corpus(smollm_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    out = tmp_path_factory.mktemp("corpus") / "out"
    (out / "tokenizer").parent.mkdir()
    (out / "tokenizer").symlink_to(smollm_tokenizer_folder)
    tokens = np.random.default_rng(0).integers(3, 49152, (4, 16)).astype("<u2")
    flags = np.full(tokens.shape, LOSS, np.uint8)
    flags[:, 0], flags[:, -1] = LOSS | DOC_START, 0
    for kind, array in {"tokens": tokens, "flags": flags, "bytes": np.full(4, 15, "u4")}.items():
        np.save(out / f"train.{kind}.npy", array)
    split = SplitMeta(4, 4, 64, 60, 60, tokens_digest(tokens, flags))
    (out / "corpus.json").write_text(
        CorpusMeta(16, "concat", 49152, "t" * 64, None, None, 0, {"train": split}).to_json()
    )
    return Artefact("corpus", "corpus", "corpus", "c" * 64, out.parent)


def _run(folder: Path, corpus: Artefact, teacher: ModelRef | None, **keys: Any) -> dict[str, Any]:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ctx = StageContext(
        "student",
        StudentConfig(**keys),
        {"corpus": [corpus]},
        teacher,
        folder / "out",
        folder / "work",
        runtime=Runtime("cpu", 1),
    )
    metrics = STAGE.run(ctx)
    STAGE.verify(ctx, metrics)
    return metrics


@pytest.mark.parametrize("keys", [{"architecture": "llama"}, {"architecture": "lfm2", "attention_layers": 1}])
def test_random_students_have_the_asked_shape(
    keys: dict[str, Any], corpus: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    shape = {"layers": 2, "attention_layers": 2, "hidden_size": 48, "heads": 3, "kv_heads": 1, "intermediate_size": 64}
    metrics = _run(tmp_path, corpus, teacher, init="random", **(shape | keys))
    model = load_model(tmp_path / "out" / "model")
    assert model.config.hidden_size == 48 and model.config.num_hidden_layers == 2
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert json.loads((tmp_path / "out" / "student.json").read_text())["init"] == "random"


def test_a_checkpoint_is_taken_as_it_is(corpus: Artefact, toy_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = toy_llama(3)
    _run(tmp_path, corpus, None, init="checkpoint", source=str(folder))
    before, after = load_model(folder).state_dict(), load_model(tmp_path / "out" / "model").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_checkpoint_on_a_grid_stays_there_and_packed_integers_are_refused(
    corpus: Artefact, toy_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from lmdistill.quantization.placement import Placement

    folder = tmp_path / "source"
    shutil.copytree(toy_llama(3), folder)
    scales = {"model.norm.weight": {"d": torch.ones(2, 1)}}
    Placement({"model.norm.weight": "q8_0"}, scales, preset="q8_0").save(folder)
    _run(tmp_path / "a", corpus, None, init="checkpoint", source=str(folder))
    found = Placement.load(tmp_path / "a/out/model")
    assert (
        found is not None
        and found.preset == "q8_0"
        and torch.equal(found.scales["model.norm.weight"]["d"], torch.ones(2, 1))
    )
    assert "placement" not in json.loads((tmp_path / "a/out/student.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(PreflightError, match="its weights are packed integers"):
        _run(tmp_path / "b", corpus, None, init="checkpoint", source=str(folder))
    begun = StudentConfig(init="checkpoint", source=str(folder))  # type: ignore[arg-type]
    planned = Planned("corpus", "corpus", "corpus", "c" * 64, StageConfig(), {}, corpus)
    with pytest.raises(PreflightError, match="its weights are packed integers"):
        STAGE.preflight(PreflightContext("student", begun, {"corpus": [planned]}, None, tmp_path))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert STAGE.preflight(PreflightContext("student", begun, {"corpus": [planned]}, None, tmp_path)) == []


def test_a_checkpoint_with_other_tokens_is_refused_with_the_ids(
    corpus: Artefact, toy_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = toy_llama(4)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    swapped = {names[500]: 501, names[501]: 500}
    tokenizer["model"]["vocab"].update(swapped)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PreflightError, match="500"):
        _run(tmp_path, corpus, None, init="checkpoint", source=str(folder))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": 5, "attention_layers": 1}, "layers 5 is more than the teacher's 4"),
        ({"layers": 3, "attention_layers": 3}, "is no hybrid"),
        ({"layers": 3, "attention_layers": 1, "hidden_size": 32}, "`hidden_size` is the teacher's in a grown student"),
        ({"init": "random", "layers": 2, "attention_layers": 1, "hidden_size": 50}, "do not divide"),
    ],
)
def test_impossible_shapes_are_refused_before_work(
    keys: dict[str, Any], message: str, teacher: ModelRef, tmp_path: Path
) -> None:
    problems = STAGE.preflight(PreflightContext("student", StudentConfig(**keys), {}, teacher, tmp_path))
    assert any(message in problem.what for problem in problems)
    assert all(problem.fix for problem in problems)


@pytest.mark.parametrize(
    ("teacher_keys", "message"),
    [
        ({"tie_word_embeddings": False}, "not tied"),
        ({"attention_bias": True}, "have biases"),
        ({"head_dim": 32}, "heads × head width = width"),
    ],
)
def test_teachers_that_lfm2_has_no_place_for_are_refused_before_work(
    teacher_keys: dict[str, Any], message: str, teacher: ModelRef, tmp_path: Path
) -> None:
    config = json.loads((teacher.path / "config.json").read_text()) | teacher_keys
    (tmp_path / "config.json").write_text(json.dumps(config))
    keys = StudentConfig(layers=3, attention_layers=1)
    other = ModelRef("teacher", tmp_path, "b" * 64)
    assert STAGE.preflight(PreflightContext("student", keys, {}, teacher, tmp_path)) == []
    [problem] = STAGE.preflight(PreflightContext("student", keys, {}, other, tmp_path))
    assert message in problem.what


def test_a_teacher_that_names_its_sizes_otherwise_is_refused_and_breaks_no_estimate(tmp_path: Path) -> None:
    """As GPT-2's config.json does."""
    config = {"model_type": "gpt2", "n_embd": 48, "n_layer": 4, "n_head": 3, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ctx = PreflightContext(
        "student", StudentConfig(layers=3, attention_layers=1), {}, ModelRef("gpt2", tmp_path, "b" * 64), tmp_path
    )
    [problem] = STAGE.preflight(ctx)
    assert "cannot be grown from a teacher of type 'gpt2'" in problem.what
    assert "a gpt2 has other names for its sizes" in STAGE.estimate(ctx).note


def test_keys_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="attention_layers 9 is more than layers 4"):
        StudentConfig(layers=4, attention_layers=9)
    with pytest.raises(ValidationError, match="`source` goes with `init: checkpoint`"):
        StudentConfig(source="some/path")


def test_a_random_student_is_estimated_from_its_keys(corpus: Artefact, teacher: ModelRef, tmp_path: Path) -> None:
    """Four bytes a parameter on disk, whatever its width; nothing is claimed while the vocabulary is not known."""
    keys = {"init": "random", "layers": 4, "attention_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    config = StudentConfig(**keys, heads=4, kv_heads=2)
    planned = Planned("corpus", "corpus", "corpus", "1", StageConfig())
    ctx = PreflightContext("student", config, {"corpus": [planned]}, teacher, tmp_path)
    made = _run(tmp_path, corpus, teacher, **keys, heads=4, kv_heads=2)
    assert STAGE.estimate(ctx).disk_bytes == 4 * made["parameters"]
    assert STAGE.estimate(replace(ctx, teacher=None)).seconds is None
