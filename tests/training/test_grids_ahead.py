"""What of grids is refused before anything runs: students that an earlier stage, or a checkpoint, will leave on one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_toys import train_toy

from lmdistill.pipeline.launch_keys import LaunchSection
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageConfig
from lmdistill.quantization.planned import lies_on, put_there
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.student import StudentConfig
from lmdistill.training.config import DistillConfig

Q8 = {"grid": "q8_0", "keep": ["*down_proj*"]}  # 48 inputs are no whole blocks
THREE_BITS = {"grid": "uniform", "bits": 3, "bucket": 16}


def _model(artefact: Artefact) -> Path:
    return artefact.out / "model"


def _planned(config: StageConfig, *student: Planned, name: str = "first") -> Planned:
    return Planned(name, "distill", "model", name[0] * 64, config, {"student": student})


def _quantize(keys: dict[str, Any]) -> DistillConfig:
    return DistillConfig.model_validate({"quantize": keys})


def _preflight(config: DistillConfig, student: Planned, teacher: ModelRef | None, folder: Path) -> list[str]:
    inputs = {"student": [student]}
    return [str(one) for one in DistillStage().preflight(PreflightContext("qad", config, inputs, teacher, folder))]


def test_a_student_that_will_be_converted_is_refused_before_anything_runs(tmp_path: Path) -> None:
    earlier = DistillConfig.model_validate({"quantize": {"grid": "q8_0"}})
    student = Planned("first", "distill", "model", "f" * 64, earlier)
    for grid, problems in (("q4_0", 1), ("q8_0", 0)):
        config = DistillConfig.model_validate({"quantize": {"grid": grid}})
        found = _preflight(config, student, None, tmp_path)
        assert len(found) == problems and all(
            "will be converted: stage 'first' leaves it on 'q8_0'" in p for p in found
        )


@pytest.mark.parametrize(
    ("first", "keys", "message"),
    [
        (Q8, {"scales": "learned"}, "`scales: follow` would put it on another such grid"),
        (Q8, {"embeddings": "f16"}, "is converted: model.embed_tokens.weight lies on f16"),
        (Q8, {"keep": ("*q_proj*", "*down_proj*")}, "is converted: model.layers.0.self_attn.q_proj.weight lies on f16"),
        # K-quants by name, and none of its widths fits them
        (Q8 | {"grid": "q4_k_m"}, {"scales": "learned"}, "`scales: follow` would put it on another such grid"),
    ],
    ids=["scales", "embeddings", "kept", "widths"],
)
def test_a_planned_student_lies_where_the_recipe_puts_it(
    first: dict[str, Any], keys: dict[str, Any], message: str, student: Artefact, tmp_path: Path
) -> None:
    """Before the first of two trainings: the second asks for other places, or lets its scales go."""
    source = Planned("student", "student", "student", "d" * 64, DistillConfig(), {}, student)
    earlier = _planned(_quantize(first | keys), source)
    teacher = ModelRef("teacher", _model(student), "t" * 64)
    [problem] = _preflight(_quantize(first), earlier, teacher, tmp_path)
    assert "stage 'qad': its student" in problem and message in problem


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"grid": "uniform", "bucket": 16}, {"grid": "uniform", "bucket": 16, "bits": 4}),
        (THREE_BITS | {"share_bits": "logarithmic"}, THREE_BITS | {"share_bits": "logarithmic"}),
        (THREE_BITS, THREE_BITS),
    ],
    ids=["default", "shared", "same"],
)
def test_a_planned_student_is_trained_on_where_it_will_lie(
    first: dict[str, Any], second: dict[str, Any], student: Artefact, tmp_path: Path
) -> None:
    source = Planned("student", "student", "student", "d" * 64, DistillConfig(), {}, student)
    teacher = ModelRef("teacher", _model(student), "t" * 64)
    assert _preflight(_quantize(second), _planned(_quantize(first), source), teacher, tmp_path) == []


def test_bits_that_will_be_shared_out_are_not_asked_for_alike(student: Artefact, tmp_path: Path) -> None:
    source = Planned("student", "student", "student", "d" * 64, DistillConfig(), {}, student)
    earlier = _planned(_quantize(THREE_BITS | {"share_bits": "logarithmic"}), source)
    teacher = ModelRef("teacher", _model(student), "t" * 64)
    [problem] = _preflight(_quantize(THREE_BITS), earlier, teacher, tmp_path)
    assert "will have its bits shared out" in problem and "set `quantize.share_bits: logarithmic` here too" in problem


def test_a_checkpoint_that_lies_on_a_grid_is_seen_before_a_student_is_made_of_it(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """On the first run: nothing is there but the folder that `source` names."""
    train_toy(tmp_path / "made", signals, student, quantize=Q8, tokens=32 * 8, lr=0.05)
    folder = tmp_path / "made/out/model"
    begun = StudentConfig(init="checkpoint", source=str(folder))  # type: ignore[arg-type]
    source = Planned("student", "student", "student", "d" * 64, begun)
    trained = _planned(DistillConfig(), source)
    assert [lies_on(one) for one in (source, trained)] == ["q8_0", "q8_0"] and put_there(trained) is source
    teacher = ModelRef("teacher", _model(student), "t" * 64)
    assert _preflight(_quantize(Q8), source, teacher, tmp_path) == []
    refused = {
        "is converted: it lies on 'q8_0', not on 'uniform'": {"quantize": THREE_BITS},
        "an adapter merged into it would not": {"lora": {}},
        "is converted: model.embed_tokens.weight lies on q8_0": {"quantize": Q8 | {"embeddings": "f16"}},
    }
    for message, keys in refused.items():
        [problem] = _preflight(DistillConfig.model_validate(keys), source, teacher, tmp_path)
        assert message in problem
    [problem] = _preflight(_quantize({"grid": "q4_0"}), trained, teacher, tmp_path)
    assert "will be converted: stage 'first' leaves it on 'q8_0'" in problem
    spread = Runtime("cuda", launch=LaunchSection(num_processes=1, fsdp={}))  # type: ignore[arg-type]
    context = PreflightContext("qad", DistillConfig(), {"student": [trained]}, teacher, tmp_path, spread)
    told = [one.what for one in DistillStage().preflight(context)]
    assert any("a student on a grid cannot be spread over processes by runtime.launch.fsdp" in one for one in told)


def test_a_planned_student_on_a_grid_has_nothing_to_teach_itself(tmp_path: Path) -> None:
    earlier = DistillConfig.model_validate({"quantize": {"grid": "q8_0"}})
    own = {"loss": "full_kl", "quantize": {"grid": "q8_0", "self_teacher": "moving"}}
    student = Planned("first", "distill", "model", "f" * 64, earlier)
    [problem] = _preflight(DistillConfig.model_validate(own), student, None, tmp_path)
    assert "its student lies on a grid, and `quantize.self_teacher: moving` has nothing to teach it" in problem


def test_others_checkpoints_may_leave_out_what_transformers_fills_in(student: Artefact, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(_model(student), folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_key_value_heads", "tie_word_embeddings"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    begun = StudentConfig(init="checkpoint", source=str(folder))  # type: ignore[arg-type]
    source = Planned("student", "student", "student", "d" * 64, begun)
    teacher = ModelRef("teacher", _model(student), "t" * 64)
    estimate = DistillStage().estimate(
        PreflightContext("distill", DistillConfig(), {"student": [source]}, teacher, tmp_path)
    )
    assert estimate.seconds is not None and estimate.seconds > 0
    [problem] = _preflight(_quantize({"grid": "q4_0"}), source, None, tmp_path)
    assert "rows of 48 weights cannot be put on grid 'q4_0'" in problem, "without a teacher too"


def test_layers_are_the_students_own_where_it_teaches_itself(student: Artefact, tmp_path: Path) -> None:
    """It has two, whatever the recipe's teacher has."""
    source = Planned("student", "student", "student", "d" * 64, DistillConfig(), {}, student)
    teacher = ModelRef("teacher", tmp_path / "teacher", "t" * 64)
    teacher.path.mkdir()
    shape = json.loads((_model(student) / "config.json").read_text()) | {"num_hidden_layers": 9}
    (teacher.path / "config.json").write_text(json.dumps(shape))
    found = {}
    for teachers in (2, 3):
        layers = {"loss": "hidden_mse", "layers": {2: teachers}, "live": True}
        own = {"loss": "full_kl", "quantize": Q8 | {"self_teacher": "frozen"}, "intermediate": [layers]}
        found[teachers] = _preflight(DistillConfig.model_validate(own), source, teacher, tmp_path)
    assert found[2] == [] and "layer 3 is not one of the teacher's" in found[3][0]


def test_a_student_that_will_lie_on_a_grid_takes_no_adapter(tmp_path: Path) -> None:
    earlier = DistillConfig.model_validate({"quantize": {"grid": "8da4w"}})
    student = Planned("first", "distill", "model", "f" * 64, earlier)
    [problem] = _preflight(DistillConfig.model_validate({"lora": {}}), student, None, tmp_path)
    assert "its student will lie on '8da4w'" in problem
    [problem] = _preflight(earlier, student, None, tmp_path)
    assert "`scales: follow` would put it on another such grid" in problem


def test_presets_need_llama_cpps_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else plain(name, *rest))
    student = Planned("student", "student", "student", "f" * 64, DistillConfig())
    [problem] = _preflight(DistillConfig.model_validate({"quantize": {}}), student, None, tmp_path)
    assert "`quantize.grid: q4_0` needs the package gguf" in problem and "lmdistill[gguf]" in problem


def test_widths_are_checked_on_the_model_that_is_there(student: Artefact, tmp_path: Path) -> None:
    config = DistillConfig.model_validate({"quantize": {"grid": "q4_0"}})
    planned = Planned("student", "student", "student", "d" * 64, DistillConfig(), {}, student)
    [problem] = _preflight(config, planned, None, tmp_path)
    assert "rows of 48 weights cannot be put on grid 'q4_0'" in problem and "quantize.keep" in problem
