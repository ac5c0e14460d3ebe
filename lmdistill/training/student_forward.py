"""Puts the fused loss inside the student's own forward, where DDP, FSDP and autocast expect it.

The model stays a `PreTrainedModel` (saving, tied weights, checkpoints all work); only this instance's forward
takes the teacher's signals and returns the loss instead of logits.

Axes: R rows, T positions, D hidden width, K entries, N positions whose prediction counts.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import Targets
from lmdistill.training.token_keys import TokenWeights
from lmdistill.training.token_weights import Places, weighed

if TYPE_CHECKING:
    from lmdistill.training.live_teacher import LiveEngine


def attach_loss(
    model: Any,
    mix: Callable[[], Mix],
    chunk: int,
    teacher: LiveEngine | None = None,
    weights: TokenWeights | None = None,
) -> Any:
    """Give `model` a forward of (input_ids, labels, teacher_*) → {"loss", "kd", "ce"}; returns the model.

    The loss is a mean in nats over the counted positions of the whole (accumulated) batch. `mix` says how it is made
    up in the step at hand. A live `teacher` sees the same rows in the same step. `weights` are those of tokens.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        teacher_ids: torch.Tensor,
        teacher_logp: torch.Tensor,
        teacher_tail: torch.Tensor,
        teacher_weight: torch.Tensor | None = None,
        teacher_next: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        hidden_RTD = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        counts_RT = labels != -100
        hidden_ND = hidden_RTD[counts_RT]
        if torch.is_autocast_enabled(hidden_ND.device.type):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(hidden_ND.device.type))
        targets = Targets(
            labels[counts_RT],
            teacher_ids[counts_RT].long(),
            teacher_logp[counts_RT],
            teacher_tail[counts_RT],
            None if teacher_weight is None else teacher_weight[counts_RT],
        )
        if teacher is not None:
            targets = replace(targets, live=teacher.speak(input_ids, position_ids, counts_RT))
        if weights is not None and teacher_next is not None:
            row_RT = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
            places = Places(teacher_next[counts_RT], row_RT[counts_RT], len(labels))
            targets = weighed(weights, targets, places, hidden_ND, self.lm_head.weight, chunk)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums = fused_head_loss(hidden_ND, self.lm_head.weight, targets, mix(), chunk)
        count = hidden_ND.shape[0] if num_items_in_batch is None else num_items_in_batch
        return {"loss": sums.total / count, "kd": sums.kd / count, "ce": sums.ce / count}

    model.forward = types.MethodType(forward, model)
    model.accepts_loss_kwargs = True
    return model
