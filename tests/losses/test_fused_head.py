"""The fused head itself: what it holds, what it never waits for, and that blocks and scale leave the gradients alone.

Axes: N positions, V vocabulary, K cached entries, D hidden width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import cached
from torch.utils._python_dispatch import TorchDispatchMode

from lmdistill.losses import fused_head, registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, Targets

V, K, D = 60, 5, 8
TOP_K = sorted(name for name, one in registry.catalogue().items() if one.signals in ("top_k", "any"))


def _inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(tokens)
    hidden_ND = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator).requires_grad_()
    few = cached(torch.randn(3, V, generator=generator).log_softmax(-1), K)
    times = -(-tokens // 3)
    arrays = [one for one in vars(few).values() if one is not None]
    repeated = [one.repeat(times, *[1] * (one.dim() - 1))[:tokens] for one in arrays]
    return hidden_ND, head_VD, Targets(*repeated)


def _mix(name: str) -> Mix:
    return Mix(registry.get(name), LossOptions(2.0), 0.75, 0.25)


def _gradients(tokens: int, dtype: torch.dtype, chunk: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_ND, head_VD, targets = _inputs(tokens, dtype)
    (fused_head_loss(hidden_ND, head_VD, targets, _mix("decoupled_topk"), chunk).total * scale).backward()
    assert hidden_ND.grad is not None and head_VD.grad is not None
    return hidden_ND.grad, head_VD.grad


class _Largest(TorchDispatchMode):
    """How many elements the largest array has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        outputs = made if isinstance(made, tuple | list) else [made]
        self.elements = max([self.elements, *(one.numel() for one in outputs if isinstance(one, torch.Tensor))])
        return made


@pytest.mark.parametrize("name", TOP_K)
def test_no_array_grows_with_tokens_times_vocabulary(name: str) -> None:
    held = []
    for tokens in (8, 32):
        hidden_ND, head_VD, targets = _inputs(tokens)
        with _Largest() as largest:
            fused_head_loss(hidden_ND, head_VD, targets, _mix(name), chunk=4).total.backward()
        held.append(largest.elements)
    assert held == [V * D, V * D]  # the head's gradient


@pytest.mark.parametrize("name", TOP_K)
def test_off_a_cpu_no_step_waits_for_a_value(name: str) -> None:
    """The meta device has shapes and no values: it refuses whatever would have to be read back."""
    hidden_ND, head_VD, targets = _inputs(6, torch.bfloat16)
    there = [one.detach().to("meta").requires_grad_() for one in (hidden_ND, head_VD)]
    meta = Targets(*(one.to("meta") for one in vars(targets).values() if one is not None))
    fused_head_loss(*there, meta, _mix(name), chunk=4).total.backward()
    for one in there:
        assert one.grad is not None and one.grad.shape == one.shape and one.grad.dtype == one.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_rows_of_the_head_change_nothing_but_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _gradients(11, dtype, chunk=4)
    monkeypatch.setattr(fused_head, "CACHED_LOGITS", 3 * V)
    monkeypatch.setattr(fused_head, "HEAD_ROWS", 7)
    for mine, its in zip(_gradients(11, dtype, chunk=4), whole, strict=True):
        torch.testing.assert_close(mine, its)


def test_a_scale_is_not_rounded_to_the_precision_of_the_hidden_states() -> None:
    """1/3 is 0.2% off in bfloat16: every gradient of a mean over three would be."""
    plain, scaled = (_gradients(3, torch.bfloat16, 4, scale)[0] for scale in (1.0, 1 / 3))
    assert torch.equal(scaled, (plain.float() / 3).bfloat16())


def test_no_position_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    hidden_ND, head_VD, targets = _inputs(0)
    total = fused_head_loss(hidden_ND, head_VD, targets, _mix("decoupled_topk")).total
    total.backward()
    assert total == 0.0 and head_VD.grad is not None and not head_VD.grad.any()


def test_the_gradients_are_given_away_and_a_second_backward_says_so() -> None:
    hidden_ND, head_VD, targets = _inputs(4)
    total = fused_head_loss(hidden_ND, head_VD, targets, _mix("decoupled_topk")).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass"):
        total.backward()
