"""A model on its grid, trained on by TRL: it moves, stays on the grid, and its file has the very weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from placed import place
from safetensors.torch import load_file, save_file

from lmdistill.checkpoints import copy_tokenizer, load_model, load_tokenizer
from lmdistill.deployment.gguf_writer import read_config
from lmdistill.deployment.packed_gguf import verify_packed, write_packed_gguf
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.stays import StaysOnGrids
from lmdistill.quantization.wanted import wanted

ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "gradient_checkpointing": False,
}
QUESTION = [{"role": "user", "content": "Name a colour."}]
PAIR = {"chosen": [{"role": "assistant", "content": "Blue."}], "rejected": [{"role": "assistant", "content": "Seven."}]}


@pytest.fixture(params=["q4_0", "q4_k_m"])
def on_grid(request: pytest.FixtureRequest, toy: Any, tmp_path: Path) -> Path:
    """Two blocks on their grids: a real folder, as `distill` leaves it."""
    model = toy("llama", num_hidden_layers=2, hidden_size=256, intermediate_size=256)
    folder = tmp_path / "grid"
    folder.mkdir()
    points, placement = place(
        load_file(model / "model.safetensors"), wanted(QuantizeKeys(grid=request.param), read_config(model))
    )
    save_file(points, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    copy_tokenizer(model, folder)
    placement.save(folder)
    return folder


def _sft(model: Any, folder: Path, work: Path, **keys: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": QUESTION, "completion": PAIR["chosen"]}] * 8)
    arguments = SFTConfig(str(work), max_length=64, **ARGUMENTS | keys)
    stays = StaysOnGrids(model, folder)
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=load_tokenizer(folder), callbacks=[stays]
    )
    return trainer, stays


def _dpo(model: Any, folder: Path, work: Path, **keys: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": QUESTION, **PAIR}] * 8)
    arguments = DPOConfig(str(work), max_length=64, precompute_ref_log_probs=True, **ARGUMENTS | keys)
    stays = StaysOnGrids(model, folder)
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=rows, processing_class=load_tokenizer(folder), callbacks=[stays]
    )
    return trainer, stays


@pytest.mark.parametrize("make", [_sft, _dpo])
def test_trl_leaves_a_model_on_its_grid_and_its_file_has_those_weights(
    make: Any, on_grid: Path, tmp_path: Path
) -> None:
    trainer, stays = make(load_model(on_grid), on_grid, tmp_path / "work")
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    stays.save(tmp_path / "out")
    before, after = (load_file(one / "model.safetensors") for one in (on_grid, tmp_path / "out"))
    lay, lies = Placement.load(on_grid), Placement.load(tmp_path / "out")
    assert lay is not None and lies is not None
    assert (lies.grids, lies.preset) == (lay.grids, lay.preset)
    assert before.keys() == after.keys()
    for name, grid in lies.on_grids().items():
        assert torch.equal(grid.fake_quantise(after[name], lies.scales[name]), after[name]), name
        assert not torch.equal(before[name], after[name]), name
    target = tmp_path / "later.gguf"
    write_packed_gguf(tmp_path / "out", target, lies, lies.preset, name="later", parent="0" * 64)
    assert verify_packed(target, tmp_path / "out") == len(lies.grids)


def test_what_is_saved_before_the_end_of_training_lies_on_its_grid_too(on_grid: Path, tmp_path: Path) -> None:
    model = load_model(on_grid)
    stays = StaysOnGrids(model, on_grid)
    with torch.no_grad():
        model.lm_head.weight.add_(0.02)
    stays.save(tmp_path / "out")
    lies, after = Placement.load(tmp_path / "out"), load_file(tmp_path / "out/model.safetensors")
    assert lies is not None and not any("grid_" in name for name in after)
    for name, grid in lies.on_grids().items():
        assert torch.equal(grid.fake_quantise(after[name], lies.scales[name]), after[name]), name


def test_saving_in_the_middle_of_a_training_ends_it(on_grid: Path, tmp_path: Path) -> None:
    """The weights become their points there, and the rest of the training would be in full precision."""
    from transformers import TrainerCallback

    trainer, stays = _sft(load_model(on_grid), on_grid, tmp_path / "work")

    class Saves(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **_: Any) -> None:
            stays.save(tmp_path / "early")

    trainer.add_callback(Saves())
    with pytest.raises(LmdistillError, match="was saved in the middle of its training"):
        trainer.train()
    lies, early = Placement.load(tmp_path / "early"), load_file(tmp_path / "early/model.safetensors")
    assert lies is not None and trainer.state.global_step == 1
    for name, grid in lies.on_grids().items():
        assert torch.equal(grid.fake_quantise(early[name], lies.scales[name]), early[name]), name


def test_trl_multiplies_with_the_heads_points_too(on_grid: Path, tmp_path: Path) -> None:
    """TRL's trainers take the head's weight past its forward: off their points, the two would have other losses."""
    trainer, stays = _sft(load_model(on_grid), on_grid, tmp_path / "work", max_steps=1)
    head = trainer.model.lm_head
    with torch.no_grad():
        head.weight.add_(0.02 * torch.randn_like(head.weight))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = trainer.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
        with stays.handle.off():
            off = trainer.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert off != pytest.approx(expected, rel=1e-4)


def test_what_would_train_other_weights_than_are_saved_is_refused(on_grid: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    model = load_model(on_grid)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments.use_liger_kernel = True  # set afterwards: the package itself is not needed to be refused
    with pytest.raises(PreflightError, match="reads the head's weights past its forward"):
        StaysOnGrids(model, on_grid).on_init_end(arguments, None, None)
    adapted = load_model(on_grid)
    stays = StaysOnGrids(adapted, on_grid)
    with pytest.raises(PreflightError, match="an adapter merged into it would not"):
        stays.on_init_end(None, None, None, model=get_peft_model(adapted, LoraConfig(target_modules=["q_proj"])))  # type: ignore[arg-type]
    with pytest.raises(PreflightError, match="is loaded in bfloat16"):
        StaysOnGrids(load_model(on_grid, dtype="bfloat16"), on_grid)


def test_a_model_in_full_precision_is_left_alone(toy: Any, tmp_path: Path) -> None:
    folder = toy("llama", num_hidden_layers=2)
    trainer, stays = _sft(load_model(folder), folder, tmp_path / "work", max_steps=1)
    trainer.train()
    stays.save(tmp_path / "out")
    assert Placement.load(tmp_path / "out") is None and (tmp_path / "out/model.safetensors").exists()
