"""Positions with fewer cached entries than K: an absent entry adds nothing, and its id counts as outside.

Axes: N positions, V vocabulary, K cached entries, D hidden width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, Sums, fused_head_loss
from lmdistill.losses.registry import LossOptions, Targets
from lmdistill.signals.format import Layout
from lmdistill.signals.truncation import truncate
from lmdistill.teachers.engine import TopK

N, V, K, D = 5, 30, 8, 6


def _teacher(seed: int, spread: float, top_p: float) -> tuple[TopK, torch.Tensor]:
    """Top-K predictions cut to the mass `top_p`, and the tokens that follow."""
    generator = torch.Generator().manual_seed(seed)
    logp_NV = torch.randn(N, V, generator=generator).mul(spread).log_softmax(-1)
    logp_NK, ids_NK = logp_NV.topk(K)
    tail_N = logp_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    arrays = (array[None].numpy() for array in (ids_NK.int(), logp_NK, tail_N, tail_N))
    next_N = torch.randint(V, (N,), generator=generator)
    return truncate(TopK(*arrays), Layout(N, K, V, top_p=top_p, k_min=1)), next_N


def _loss(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets, options: LossOptions) -> Sums:
    mix = Mix(registry.get("decoupled_topk"), options, kd_weight=0.8, ce_weight=0.2)
    return fused_head_loss(hidden_ND, head_VD, targets, mix, chunk=2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 6), st.floats(0.05, 0.99), st.sampled_from([1.0, 2.0]))
def test_absent_entries_leave_loss_and_gradient_as_if_they_were_not_there(
    seed: int, spread: float, top_p: float, temperature: float
) -> None:
    """A batch of positions with various counts equals the sum over positions, each with its own K."""
    cut, next_N = _teacher(seed, spread, top_p)
    ids_NK, logp_NK, tail_N = (torch.from_numpy(array[0]) for array in (cut.ids_BTK, cut.logp_BTK, cut.tail_BT))
    options = LossOptions(temperature=temperature)
    generator = torch.Generator().manual_seed(seed + 1)
    made = [torch.randn(shape, generator=generator) for shape in ((N, D), (V, D))]
    together, apart = ([array.clone().requires_grad_() for array in made] for _ in range(2))
    whole = _loss(*together, Targets(next_N, ids_NK.long(), logp_NK, tail_N), options)
    whole.total.backward()
    counts = np.isfinite(cut.logp_BTK[0]).sum(-1).tolist()
    for n, count in enumerate(counts):
        one = slice(n, n + 1)
        alone = Targets(next_N[one], ids_NK[one, :count].long(), logp_NK[one, :count], tail_N[one])
        _loss(apart[0][one], apart[1], alone, options).total.backward()
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(whole.total)


@pytest.mark.parametrize("absent_id", [0, 3])
def test_the_loss_counts_a_dropped_id_as_outside(absent_id: int) -> None:
    """The gradient at an id that was dropped is that of any id outside: `outside · softmax`."""
    logp = torch.tensor([[0.6, 0.2]]).log()
    hidden_ND = torch.zeros(1, 4, requires_grad=True)
    head_VD = torch.eye(4)
    ids = torch.tensor([[1, 1]])
    targets = Targets(
        torch.tensor([1]), ids, torch.tensor([[float(logp[0, 0]), -torch.inf]]), torch.log(torch.tensor([0.4]))
    )
    mix = Mix(registry.get("decoupled_topk"), LossOptions(), 1.0, 0.0)
    fused_head_loss(hidden_ND, head_VD, targets, mix).total.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad[0, absent_id].item() == pytest.approx(0.25 - 0.4 / 3)
    assert hidden_ND.grad[0, 1].item() == pytest.approx(0.25 - 0.6)
