"""The distillation trainer: transformers.Trainer with our optimiser groups, data order, log and safe checkpoints.

Stopped and resumed is the same as never stopped: the data order is fixed beforehand, nothing is sampled in a
step, and a checkpoint counts only once a marker says that all of it is on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmdistill.pipeline.stage import Progress
from lmdistill.training import optimizer
from lmdistill.training.batches import Batches
from lmdistill.training.ranks import Ranks

COMPLETE = "complete"


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains a student whose forward returns "loss" and its parts, as "kd" and "ce" (see student_forward.py)."""

    def __init__(
        self,
        *args: Any,
        lr: float,
        relative: bool,
        kind: str = "adamw",
        batches: Batches | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches
        # Measured on the weights training starts from, so before any checkpoint is loaded over them.
        self._sizes = optimizer.step_sizes(self.model, lr, relative)
        self._kind = kind
        self._parts: dict[str, torch.Tensor] = {}
        self._parts_from = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The chosen optimiser with a step size of its own for each tensor."""
        if getattr(self, "optimizer", None) is None:
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer: Any = optimizer.build(self.model, self._sizes, self.args.weight_decay, betas, self._kind)
        built: torch.optim.Optimizer = self.optimizer
        return built

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The data set is already in its order."""
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's own loss; its parts are kept for the next line of the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for part in (name for name in outputs if name != "loss"):
            value = outputs[part].detach()
            self._parts[part] = self._parts[part] + value if part in self._parts else value
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each part since the last line, and the tokens seen."""
        if "loss" in logs and self._parts:
            steps = self.state.global_step - self._parts_from
            sums = {part: self.accelerator.reduce(total, "sum") for part, total in self._parts.items()}
            logs |= {part: round(total.item() / steps, 5) for part, total in sums.items()}
            self._parts, self._parts_from = {}, self.state.global_step
        super().log(logs, *args, **kwargs)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` where there is one."""
        if checkpoint is not None:
            self._parts_from = int(checkpoint.name.rsplit("-", 1)[1])
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; what a kill left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for path in found:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    complete = [path for path in found if path.exists()]
    return complete[-1] if complete else None


class CheckpointSeal(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint complete after all its files, those of all processes, are on disk."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Sync every file of the checkpoint just written, then write the marker."""
        self.ranks.wait()
        if not self.ranks.first:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in [*folder.rglob("*"), folder]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        (folder / COMPLETE).touch()


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """Passes the log on to the pipeline's progress."""

    def __init__(self, progress: Progress, done_after: Callable[[int], int], unit: str = "token") -> None:
        self.progress, self.done_after, self.unit = progress, done_after, unit

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Units done of all, with the loss and its parts."""
        if logs and "loss" in logs:
            figures = {key: logs[key] for key in ("loss", "kd", "ce") if key in logs}
            done, total = self.done_after(state.global_step), self.done_after(state.max_steps)
            self.progress.update(done, total, self.unit, **figures)
