"""From TRL's padded batch of prompts and completions to the loss: the ids themselves go to student and teacher.

TRL pads prompts on their left and completions on their right. Here the real tokens of a row are moved to its front:
causal models then need no mask, and no convolution sees padding.

Axes: R rows, P positions of prompts, C of completions, T positions of a row, N positions whose prediction counts,
K entries, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmdistill.losses.fused_head import Mix, Sums, fused_head_loss
from lmdistill.losses.registry import LiveTeacher, Targets
from lmdistill.quantization.on_grid import seen_input, seen_weight
from lmdistill.teachers.reduction import reduce_logits
from lmdistill.training.student_forward import at

if TYPE_CHECKING:
    from lmdistill.training.live_teacher import LiveEngine


def to_rows(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`prompt_ids [R, P]`, `completion_ids [R, C]` and their masks → tokens `[R, T]`, labels `[R, T]`.

    A label is the token that follows where it is the completion's, else −100. What is behind a row's end is padding.
    """
    tokens_RT = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    real_RT = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1) > 0
    said_RT = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1) > 0
    front_RT = real_RT.int().argsort(dim=1, descending=True, stable=True)[:, : int(real_RT.sum(dim=1).max())]
    tokens_RT, said_RT = tokens_RT.gather(1, front_RT), said_RT.gather(1, front_RT)
    labels_RT = torch.full_like(tokens_RT, -100)
    labels_RT[:, :-1] = tokens_RT[:, 1:].where(said_RT[:, 1:], -100)
    return tokens_RT, labels_RT


def targets_of(live: LiveTeacher, next_N: torch.Tensor, k: int, chunk: int) -> Targets:
    """What a live teacher says of N positions: its top `k` and the rest, or with k = 0 itself."""
    if k == 0:
        none_N0 = live.hidden_ND.new_zeros((len(next_N), 0), dtype=torch.float32)
        return Targets(next_N, none_N0.long(), none_N0, none_N0.sum(dim=1), live=live)
    starts = [slice(start, start + chunk) for start in range(0, len(next_N), chunk)]
    parts = [reduce_logits(live.rows(rows).logits(), next_N[rows], k)[:3] for rows in starts]
    ids_NK, logp_NK, tail_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return Targets(next_N, ids_NK.long(), logp_NK, tail_N)


def score(
    student: Any, teacher: LiveEngine, rows: tuple[torch.Tensor, torch.Tensor], mix: Mix, k: int, chunk: int
) -> Sums:
    """The loss of `rows` (tokens and labels `[R, T]`), summed over the positions with a label, in nats."""
    tokens_RT, labels_RT = rows
    counted_N = (labels_RT != -100).flatten().nonzero()[:, 0]
    hidden_ND = at(student.base_model(input_ids=tokens_RT, use_cache=False).last_hidden_state, counted_N)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        live = teacher.speak(tokens_RT, None, counted_N)
        with torch.no_grad():
            targets = targets_of(live, at(labels_RT, counted_N), k, chunk)
        head = student.get_output_embeddings()
        return fused_head_loss(seen_input(head, hidden_ND), seen_weight(head), targets, mix, chunk)
