"""Which mix of losses a step is made with, where λ or τ change in the course of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix
from lmdistill.training.config import DistillConfig
from lmdistill.training.schedules import value_at


class Phases(TrainerCallback):  # type: ignore[misc]
    """Follows the trainer's step, which a checkpoint brings back: nothing of its own has to be saved."""

    def __init__(self, config: DistillConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self._loss, self._options = registry.get(config.loss), config.options()
        self.mix = self.at(0)

    def at(self, step: int) -> Mix:
        """The mix in step `step`, from 0."""
        config = self.config
        tau = value_at(config.temperature, config.temperature_schedule, step, self.steps)
        kd_weight = value_at(config.weight, config.kd_weight_schedule, step, self.steps)
        return Mix(self._loss, replace(self._options, temperature=tau), *config.weights(kd_weight))

    def now(self) -> Mix:
        """The mix of the step that is being made."""
        return self.mix

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move on."""
        self.mix = self.at(state.global_step)
