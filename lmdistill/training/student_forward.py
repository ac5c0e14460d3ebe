"""Puts the fused loss inside the student's own forward and its head's, where DDP, FSDP and autocast expect it.

The model stays a `PreTrainedModel` (saving, tied weights, checkpoints all work); only this instance's forward
takes the teacher's signals and returns the loss instead of logits. The head's own forward takes hidden states and
returns the loss: whoever shards the model gathers a module's weights when its forward is called, and only then.
Nothing in a step waits for the device: which positions count is known to the collator, on the host.

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
from lmdistill.quantization.on_grid import seen_input, seen_weight
from lmdistill.training.packing_known import packing_known
from lmdistill.training.token_keys import TokenWeights
from lmdistill.training.token_weights import Places, weighed

if TYPE_CHECKING:
    from lmdistill.training.adapter import BaseTeacher
    from lmdistill.training.live_teacher import LiveEngine
    from lmdistill.training.on_grids import MovingTeacher


def attach_loss(
    model: Any,
    mix: Callable[[], Mix],
    chunk: int,
    teacher: LiveEngine | BaseTeacher | MovingTeacher | None = None,
    weights: TokenWeights | None = None,
) -> Any:
    """Give `model` a forward of (input_ids, labels, counted, teacher_*) → {"loss", "kd", "ce"}; returns the model.

    The loss is a mean in nats over the counted positions of the whole (accumulated) batch. `mix` says how it is made
    up in the step at hand. A live `teacher` sees the same rows in the same step. `weights` are those of tokens.
    `counted` [N] numbers the positions that count in the flat batch [R·T].
    """

    def loss_of_head(
        self: Any, hidden_ND: torch.Tensor, targets: Targets, places: Places | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight_VD, hidden_ND = seen_weight(self), seen_input(self, hidden_ND)
        if weights is not None and places is not None:
            targets = weighed(weights, targets, places, hidden_ND, weight_VD, chunk)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums = fused_head_loss(hidden_ND, weight_VD, targets, mix(), chunk)
        return sums.total, sums.kd, sums.ce

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        counted: torch.Tensor,
        teacher_ids: torch.Tensor,
        teacher_logp: torch.Tensor,
        teacher_tail: torch.Tensor,
        teacher_weight: torch.Tensor | None = None,
        teacher_next: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        with packing_known(position_ids is not None):
            hidden_RTD = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        hidden_ND = at(hidden_RTD, counted)
        if torch.is_autocast_enabled(hidden_ND.device.type):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(hidden_ND.device.type))
        targets = Targets(
            at(labels, counted),
            at(teacher_ids, counted).long(),
            at(teacher_logp, counted),
            at(teacher_tail, counted),
            None if teacher_weight is None else at(teacher_weight, counted),
        )
        if teacher is not None:
            with packing_known(position_ids is not None):
                targets = replace(targets, live=teacher.speak(input_ids, position_ids, counted))
        places = None
        if weights is not None and teacher_next is not None:
            places = Places(at(teacher_next, counted), counted // labels.shape[1], len(labels))
        total, kd, ce = self.lm_head(hidden_ND, targets, places)
        count = hidden_ND.shape[0] if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "kd": kd / count, "ce": ce / count}

    model.lm_head.__dict__["before_loss"] = model.lm_head.__dict__.get("forward")
    model.lm_head.forward = types.MethodType(loss_of_head, model.lm_head)
    model.forward = types.MethodType(forward, model)
    model.accepts_loss_kwargs = True
    return model


def detach_loss(model: Any) -> None:
    """Give `model` its own forward back, and its head the one that it had."""
    for module in (model, model.lm_head):
        module.__dict__.pop("forward")
    if (before := model.lm_head.__dict__.pop("before_loss")) is not None:
        model.lm_head.forward = before


def at(tensor_RT: torch.Tensor, counted_N: torch.Tensor) -> torch.Tensor:
    """The entries `[N, …]` of `[R, T, …]` at the flat positions `counted_N`."""
    return tensor_RT.flatten(0, 1).index_select(0, counted_N)
