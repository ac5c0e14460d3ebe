"""The held-out distillation loss of candidates, on the last rows of the teacher cache: none of them is trained on.

Axes: R rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmdistill.errors import PreflightError
from lmdistill.losses.fused_head import Mix
from lmdistill.precision import products_in
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.config import DistillConfig

Run = Callable[..., dict[str, Any]]  # a model's forward with the loss in it (training/student_forward.py)
ROWS_AT_ONCE = 4


class TrainingRows(SignalsReader):
    """A cache without its last rows."""

    def __init__(self, folder: Path, split: str, held_out: int) -> None:
        """Leave out `held_out` rows; PreflightError where none would be left."""
        self.held_out = held_out
        super().__init__(folder, split)
        if self.rows < 1:
            raise PreflightError(
                f"the teacher cache has {self.rows + held_out} rows of '{split}', and the search holds out {held_out}",
                fix="lower `heldout_rows`, or raise the corpus' `train_tokens`",
            )

    @property
    def rows(self) -> int:
        """Rows R to train on."""
        return super().rows - self.held_out


class HeldOutLoss:
    """Scores models on the held-out rows, in nats a position that counts."""

    def __init__(self, reader: TrainingRows, config: DistillConfig, device: str) -> None:
        from lmdistill.training.data import SignalsCollator
        from lmdistill.training.phases import Phases

        whole = SignalsReader(reader.folder, reader.split)
        collator = SignalsCollator(whole, reader.manifest.packing == "isolate")
        rows = range(reader.rows, whole.rows)
        self._half = products_in(config.precision, device) == "bfloat16"
        self._device, self.mix, self._chunk = device, Phases(config, 1).at(0), config.chunk
        self._batches = [
            {name: tensor.to(device) for name, tensor in collator(rows[start : start + ROWS_AT_ONCE]).items()}
            for start in range(0, len(rows), ROWS_AT_ONCE)
        ]
        self._count = sum(len(batch["counted"]) for batch in self._batches)

    def prepare(self, model: Any) -> None:
        """Put the loss into a model's forward, with the weights of the first step."""
        from lmdistill.training.student_forward import attach_loss

        attach_loss(model, self._mix, self._chunk)

    def _mix(self) -> Mix:
        return self.mix

    def of(self, run: Run) -> dict[str, float]:
        """The distillation loss `kd` and the cross-entropy `ce` of a prepared model."""
        import torch

        sums = {"kd": 0.0, "ce": 0.0}
        device = self._device.split(":")[0]
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self._half):
            for batch in self._batches:
                found = run(**batch, num_items_in_batch=1)
                for part in sums:
                    sums[part] += found[part].item()
        return {part: total / self._count for part, total in sums.items()}

    def of_folder(self, folder: Path) -> dict[str, float]:
        """The same of a checkpoint."""
        from lmdistill.checkpoints import load_model

        model = load_model(folder, device=self._device)
        self.prepare(model)
        return self.of(model)
