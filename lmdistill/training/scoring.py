"""What a student makes of its rows without learning from them: log-probs of the tokens that follow.

Axes: R rows, T tokens in a row, D hidden width, V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from lmdistill.training.data import SignalsCollator


def next_log_probs(hidden_ND: torch.Tensor, head_VD: torch.Tensor, next_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """log q(next) `[N]` in float32 of `softmax(hidden @ head.T)`, by chunks, without gradient."""
    import torch

    found = []
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        head_VD = head_VD.to(hidden_ND.dtype)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logits_NV = (hidden_ND[rows] @ head_VD.T).float()
            found.append(logits_NV.gather(1, next_N[rows, None])[:, 0] - logits_NV.logsumexp(-1))
    return torch.cat(found) if found else hidden_ND.new_zeros(0, dtype=torch.float32)


def scored_rows(
    model: Any, collator: SignalsCollator, rows: Sequence[int], batch_rows: int, chunk: int, bfloat16: bool
) -> Iterator[NDArray[np.float32]]:
    """The model's log-probs of the next tokens `[R, T]` of some rows at a time, NaN where a prediction does not count.

    Matrix products are in bfloat16 where it is asked for, as in training.
    """
    import torch

    from lmdistill.quantization.on_grid import seen_input, seen_weight

    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_rows):
        inputs = {name: tensor.to(device) for name, tensor in collator(rows[start : start + batch_rows]).items()}
        labels_RT = inputs["labels"]
        counts_RT = labels_RT != -100
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            body = model.model(
                input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids"), use_cache=False
            ).last_hidden_state
        hidden_ND = body[counts_RT].to(torch.bfloat16 if bfloat16 else body.dtype)
        lp_RT = torch.full(labels_RT.shape, torch.nan, device=device)
        seen_ND, weight_VD = seen_input(model.lm_head, hidden_ND), seen_weight(model.lm_head)
        lp_RT[counts_RT] = next_log_probs(seen_ND, weight_VD, labels_RT[counts_RT], chunk)
        yield lp_RT.cpu().numpy()
