"""A model that lies on grids under anyone's trainer: one callback for `transformers.Trainer`, and so for TRL's.

    stays = StaysOnGrids(model, folder)  # the folder that `model` was loaded from
    SFTTrainer(model, args, train_dataset=rows, callbacks=[stays]).train()
    stays.save(target)

What is trained, logged, evaluated and chosen as the best is the model at its points; checkpoints have the weights that
the gradient goes to, so that a stopped training goes on; what is saved are points, with the record of where they lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.quantization.on_grid import kept_on_its_grids
from lmdistill.quantization.placement import Placement

_HEAD = "lm_head"


class StaysOnGrids(TrainerCallback):  # type: ignore[misc]
    """Does nothing to a model whose folder lies on no grid, so that one script serves both."""

    def __init__(self, model: Any, folder: Path) -> None:
        """Put `model` back on the grids of `folder`; PreflightError where its weights cannot hold their points."""
        self.model, self.folder = model, Path(folder)
        self.handle = kept_on_its_grids(model, self.folder)
        self.placement: Placement | None = None
        self._training = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Raise PreflightError for what would train weights other than those that are saved."""
        if self.handle is None:
            return
        if hasattr(given.get("model", self.model), "peft_config"):
            raise PreflightError(
                f"the checkpoint {self.folder} lies on a grid, and an adapter merged into it would not",
                fix="train its weights, or adapt the checkpoint in full precision and quantize after that",
            )
        if _past_the_head(args) and "seen" in self.model.get_submodule(_HEAD).__dict__:
            raise PreflightError(
                "`use_liger_kernel` reads the head's weights past its forward, where they are not yet on their grid",
                why=f"the head of {self.folder} lies on one, and the loss would be that of another model",
                fix='set `liger_kernel_config={"fused_linear_cross_entropy": False}`',
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on the weights are not the points."""
        self._training = True

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise LmdistillError where `save` has ended the grid: what followed would learn in full precision."""
        if self._training and self.placement is not None:
            raise LmdistillError(
                "a model on a grid was saved in the middle of its training, and lies on its points for good",
                why="its weights became their points, and it would learn on without its grid",
                fix="save it after training; the trainer's own checkpoints (`save_steps`) are what goes on",
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the weights lie on their points for good."""
        self._training = False
        self._settle()

    def save(self, target: Path) -> None:
        """Write the model, at its points for good, where it lies, and the tokenizer of its folder to `target`.

        That ends a training: the next step is refused.
        """
        from lmdistill.checkpoints import save_model

        self._settle()
        save_model(self.model, target, tokenizer_from=self.folder)
        if self.placement is not None:
            self.placement.save(target)

    def _settle(self) -> None:
        if self.handle is not None:
            self.placement, self.handle = self.handle.settle(), None


def _past_the_head(args: Any) -> bool:
    """Whether Liger's loss takes the head's weight itself (TRL's trainers switch that off)."""
    kernels = getattr(args, "liger_kernel_config", None) or {}
    return bool(getattr(args, "use_liger_kernel", False)) and kernels.get("fused_linear_cross_entropy", True)
