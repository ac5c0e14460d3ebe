"""LoRA students: only the adapter moves, the result is merged, and the base can be the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_distill_stage import STAGE, _train

from lmdistill.checkpoints import load_model
from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import Artefact, PreflightContext
from lmdistill.training.config import DistillConfig

pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8}


def test_an_adapter_learns_from_a_cache_and_the_model_folder_has_it_merged(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    from peft import PeftModel

    record = _train(tmp_path, signals, student, lora=LORA, save_grid="float32", lr_scale="absolute", lr=0.02)
    assert record["log"][-1]["kd"] < 0.95 * record["log"][0]["kd"]
    before, after = (load_file(place / "out/model/model.safetensors") for place in (student.path, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    base = load_model(student.out / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        merged = load_model(tmp_path / "out/model")(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter")).eval()(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert record["frozen"] == record["parameters"] == sum(tensor.numel() for tensor in after.values())


def test_the_adapters_files_name_no_path_of_this_machine(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    _train(tmp_path, signals, student, lora=LORA, tokens=512)
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert str(student.path) not in json.dumps(config)


def test_with_the_base_as_teacher_the_first_step_loses_nothing_and_the_adapter_stays_near(
    corpus: Artefact, student: Artefact, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"loss": "full_kl", "lr_scale": "absolute", "lr": 0.02, "log_steps": 1}
    tied = _train(tmp_path / "tied", corpus, student, lora={**LORA, "base_teaches": True}, kd_weight=0.95, **keys)
    free = _train(tmp_path / "free", corpus, student, lora={**LORA, "base_teaches": True}, kd_weight=0.05, **keys)
    assert tied["log"][0]["kd"] == pytest.approx(0, abs=1e-5)
    assert 0 < tied["log"][-1]["kd"] < free["log"][-1]["kd"]
    assert free["log"][-1]["ce"] < free["log"][0]["ce"]


def test_the_base_as_teacher_says_what_a_copy_of_it_would_say(student: Artefact) -> None:
    from lmdistill.training.adapter import BaseTeacher, adapted
    from lmdistill.training.adapter_keys import LoraKeys

    model = adapted(load_model(student.out / "model"), LoraKeys(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(10)[None]
    said = BaseTeacher(model, 60).speak(ids, None, torch.arange(10)).logits()
    with torch.no_grad():
        alone = load_model(student.out / "model")(ids).logits[0]
        assert torch.equal(said, alone)
        assert not torch.allclose(model(ids).logits[0], alone, atol=1e-2)


def test_a_relative_step_moves_an_adapted_weight_by_that_share_of_it(student: Artefact) -> None:
    from lmdistill.training.adapter import adapted
    from lmdistill.training.adapter_keys import LoraKeys
    from lmdistill.training.optimizer import step_sizes

    model = adapted(load_model(student.out / "model"), LoraKeys(rank=8, alpha=32))
    sizes = step_sizes(model, 0.01, relative=True)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # one step of Adam from zero: all entries of one size
            parameter.data = sizes[name] * torch.sign(torch.randn_like(parameter))
    for layer in (one for one in model.modules() if hasattr(one, "get_delta_weight")):
        share = (
            layer.get_delta_weight("default").pow(2).mean().sqrt() / layer.get_base_layer().weight.pow(2).mean().sqrt()
        )
        assert 0.008 < share < 0.0125
    assert set(step_sizes(model, 0.01, relative=False).values()) == {0.01}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", r"`lora.targets: q_prj` names no linear layer"),
        ("lm_head", "would adapt the head"),
        ("embed_tokens", "would adapt the head"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(
    target: str, message: str, signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    with pytest.raises(LmdistillError, match=message):
        _train(tmp_path, signals, student, lora={**LORA, "targets": (target,)})


def test_named_targets_alone_are_adapted(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    _train(tmp_path, signals, student, lora={**LORA, "targets": ("q_proj", "up_proj")}, tokens=512)
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "up_proj"}


def test_freeze_and_a_base_teacher_without_a_live_loss_are_refused_by_the_recipe() -> None:
    with pytest.raises(ValidationError, match="freeze"):
        DistillConfig(lora=LORA, freeze=("*",))
    with pytest.raises(ValidationError, match="base_teaches needs a loss"):
        DistillConfig(lora={"base_teaches": True})


def test_peft_missing_is_named_with_its_extra_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [problem] = STAGE.preflight(PreflightContext("distill", DistillConfig(lora=LORA), {}, None, tmp_path))
    assert "`lora` needs the package peft" in problem.what and "lmdistill[lora]" in problem.fix


def test_peft_is_in_the_fingerprint_only_where_it_is_used() -> None:
    assert "peft" in STAGE.tools_used(DistillConfig(lora=LORA))
    assert STAGE.tools_used(DistillConfig()) == STAGE.tools
    assert not STAGE.uses_teacher(DistillConfig(loss="full_kl", lora={"base_teaches": True}))
