"""A student that learns through a low-rank adapter of PEFT, and its base as the teacher beside it.

The adapter is trained, the base stays as it is: base and student share one set of weights in memory. With the adapter
switched off the student is its base, so a live teacher costs its forward pass and no more. After training the adapter
is merged, so that what follows (export, evaluation, more training) sees a plain checkpoint; it is also kept by itself.

Axes: R rows, T tokens in a row, D hidden width, V vocabulary, N positions whose prediction counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmdistill.errors import LmdistillError
from lmdistill.losses.registry import LiveTeacher
from lmdistill.training.adapter_keys import ALL_LINEAR, LoraKeys


def adapted(student: Any, keys: LoraKeys) -> Any:
    """`student` with a fresh adapter: a PEFT model, in which only the adapter is trained.

    Raises LmdistillError for a target that names no layer, or one that is read past its own forward.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(student, keys.targets)
    targets = ALL_LINEAR if ALL_LINEAR in keys.targets else list(keys.targets)
    config = LoraConfig(r=keys.rank, lora_alpha=keys.alpha, lora_dropout=keys.dropout, target_modules=targets)
    model = get_peft_model(student, config)
    _measure_steps(model)
    return model


def _measure_steps(model: Any) -> None:
    """Say of each B, which begins at zero, what a relative step is relative to.

    ΔW = s·B·A has entries of about s·√r·rms(B)·rms(A); the size of B that makes them those of W is its measure. A step
    of `lr` in units of it then moves W by the share `lr` of its size, as a relative step of W itself would.
    """
    from peft.tuners.lora import LoraLayer

    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, down in layer.lora_A.items():
            reach = layer.scaling[name] * layer.r[name] ** 0.5 * _rms(down.weight)
            layer.lora_B[name].weight.measure = _rms(layer.get_base_layer().weight) / reach


def _rms(weight: torch.Tensor) -> float:
    return float(weight.detach().float().pow(2).mean().sqrt())


def check_targets(student: Any, targets: tuple[str, ...]) -> None:
    """Raise LmdistillError unless each target ends the name of some layer other than head and embeddings."""
    linear = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)]
    unfit = {student.get_input_embeddings(), student.get_output_embeddings()}
    unfit_names = [name for name, module in student.named_modules() if module in unfit]
    for target in targets:
        if target == ALL_LINEAR:
            continue
        if any(_ends(name, target) for name in unfit_names):
            raise LmdistillError(
                f"`lora.targets: {target}` would adapt the head or the embeddings",
                why="the loss reads the head's weight itself, and tied embeddings share it",
                fix="name layers inside the blocks, or all-linear",
            )
        if not any(_ends(name, target) for name in linear):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear if name not in unfit_names})
            raise LmdistillError(
                f"`lora.targets: {target}` names no linear layer of the student", fix=f"it has: {', '.join(kinds)}"
            )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def student_of(model: Any) -> Any:
    """The student itself, whether `model` is a PEFT model around it or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merge(model: Any, folder: Path) -> Any:
    """Write the adapter into `folder` as PEFT reads it, then add it to the base; returns the plain student."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = None  # a path of this machine says nothing elsewhere
    config.save_pretrained(folder)
    return model.merge_and_unload()


class BaseTeacher:
    """The student's base as its live teacher: the same weights with the adapter switched off."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size

    def speak(self, tokens_RT: Any, positions_RT: Any, counted_N: Any) -> LiveTeacher:
        """What the base has to say at the flat positions that count, in the precision of the student's own products."""
        from lmdistill.training.live_teacher import spoken_by

        with self._model.disable_adapter():
            return spoken_by(student_of(self._model), self._vocab_size, tokens_RT, positions_RT, counted_N)
