"""The on-policy trainer: TRL's DistillationTrainer samples, batches and keeps vLLM up to date; the loss is ours.

What is ours too: prompts are token ids already and stay them, a step's sampling has a seed of its own, so that a run
that is stopped goes on with the same completions, and a step may take the data's completions instead (GKD, arXiv
2306.13649, algorithm 1, where λ is `student_share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from trl import DistillationTrainer as TrlDistillationTrainer

from lmdistill.losses.fused_head import Mix
from lmdistill.on_policy.prompts import Prompt
from lmdistill.on_policy.scoring import score, to_rows
from lmdistill.training.trainer import DistillationTrainer

if TYPE_CHECKING:
    from lmdistill.training.live_teacher import LiveEngine


class PromptDataset(Dataset[dict[str, Prompt]]):  # type: ignore[misc]
    """The prompts of a run in the order in which it sees them, as TRL wants them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Prompt]:
        return {"prompt": self.prompts[index]}


def on_policy(step: int, seed: int, student_share: float) -> bool:
    """Whether a step is on the student's own completions: a draw of its own for every step."""
    return bool(np.random.default_rng([seed % 2**63, step]).random() < student_share)


def sampling_seed(step: int, seed: int, process: int) -> int:
    """What a step's sampling is seeded with."""
    return int(np.random.SeedSequence([seed % 2**63, step, process]).generate_state(1)[0])


class OnPolicyTrainer(DistillationTrainer, TrlDistillationTrainer):  # type: ignore[misc]
    """Trains a student on its own completions, scored by a live teacher."""

    def __init__(
        self, *args: Any, teacher: LiveEngine, mix: Mix, k: int, chunk: int, student_share: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._teacher, self._mix, self._k, self._chunk, self._student_share = teacher, mix, k, chunk, student_share

    def _send_telemetry(self) -> None:
        """Nothing is told to anyone."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The artefact's own records say how the model was made."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """TRL's, which gives a step's prompts once for each of its parts; the data set is already in its order."""
        sampler: Sampler[int] = TrlDistillationTrainer._get_train_sampler(self, train_dataset)
        return sampler

    def _generate(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]], None, None, list[Any]]:
        """The prompts' ids and those of their completions, in the form TRL takes them."""
        step, seed = self.state.global_step, self.args.seed
        asked = [list(prompt.ids) for prompt in prompts]
        if on_policy(step, seed, self._student_share):
            said = self._sampled(asked, sampling_seed(step, seed, self.accelerator.process_index))
        else:
            said = [list(prompt.answer[: self.max_completion_length]) for prompt in prompts]
        return asked, said, None, None, []

    def _sampled(self, asked: list[list[int]], seed: int) -> list[list[int]]:
        """The student's completions; the trainer's own random state is left as it was."""
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            if self.use_vllm:  # it draws by itself, every request from this seed
                self.vllm_generation.generation_kwargs["seed"] = seed
            with self.accelerator.autocast():  # around all of it: weights are rounded once and not for every token
                completions: list[list[int]] = self._generate_single_turn(asked, None, {})
        return completions

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The mean loss in nats over the step's completion tokens; its parts are kept for the next line of the log."""
        student = self.accelerator.unwrap_model(model)
        total, kd, ce = self._forward_redirection(model, student, self._scored, student, inputs)
        count = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        parts = {"kd": kd / count, "ce": ce / count, "said": inputs["completion_mask"].sum().float()}
        for part, value in parts.items():
            self._parts[part] = self._parts[part] + value if part in self._parts else value
        loss = total / count
        return (loss, parts) if return_outputs else loss

    def _scored(self, student: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self.accelerator.autocast():
            sums = score(student, self._teacher, to_rows(inputs), self._mix, self._k, self._chunk)
        return sums.total, sums.kd, sums.ce
