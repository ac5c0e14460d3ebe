"""KL over the whole vocabulary with a live teacher, against autograd and against losses on what a cache holds.

Axes: N positions, V vocabulary, K cached entries, D hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import LmdistillError
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LiveTeacher, LossOptions, Targets

N, WIDTH, TEACHER_WIDTH, PADDING = 5, 8, 6, 3
SEEDS, VOCABS = st.integers(0, 10_000), st.integers(4, 40)


def _case(seed: int, vocab: int, k: int = 0) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Hidden states, a head with padding, and targets whose teacher is live, with its top `k` beside it."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, teacher_ND = (torch.randn(N, width, generator=generator) for width in (WIDTH, TEACHER_WIDTH))
    head_VD = torch.randn(vocab + PADDING, WIDTH, generator=generator)
    live = LiveTeacher(
        teacher_ND, torch.randn(vocab, TEACHER_WIDTH, generator=generator), torch.randn(vocab, generator=generator)
    )
    logp_NV = live.logits().log_softmax(-1)
    logp_NK, ids_NK = logp_NV.topk(k)
    tail_N = logp_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    next_N = torch.randint(vocab, (N,), generator=generator)
    return hidden_ND, head_VD, Targets(next_N, ids_NK, logp_NK, tail_N, live=live)


def _fused(
    name: str, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets, options: LossOptions, ce: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_ND, head_VD = hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()
    sums = fused_head_loss(hidden_ND, head_VD, targets, Mix(registry.get(name), options, 0.75, ce), chunk=2)
    sums.total.backward()
    assert hidden_ND.grad is not None and head_VD.grad is not None
    return sums.total.detach(), hidden_ND.grad, head_VD.grad


@settings(max_examples=80, deadline=None)
@given(SEEDS, VOCABS, st.floats(0.5, 4.0), st.booleans(), st.sampled_from([0.0, 0.25]))
def test_loss_and_gradients_are_those_of_float64_autograd(
    seed: int, vocab: int, tau: float, scaled: bool, ce: float
) -> None:
    hidden_ND, head_VD, targets = _case(seed, vocab)
    found = _fused("full_kl", hidden_ND, head_VD, targets, LossOptions(tau, hinton_scaled=scaled), ce)
    assert targets.live is not None and targets.live.bias_V is not None
    exact = hidden_ND.double().requires_grad_(), head_VD.double().requires_grad_()
    logits_NV = exact[0] @ exact[1].T
    live = LiveTeacher(*(one.double() for one in (targets.live.hidden_ND, targets.live.head_VD, targets.live.bias_V)))
    log_p_NV, log_q_NV = (live.logits() / tau).log_softmax(-1), (logits_NV / tau).log_softmax(-1)[:, :vocab]
    kd = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum() * (tau**2 if scaled else 1.0)
    total = 0.75 * kd + ce * torch.nn.functional.cross_entropy(logits_NV, targets.next_N, reduction="sum")
    total.backward()
    assert found[0].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-6)
    for ours, theirs in zip(found[1:], exact, strict=True):
        assert theirs.grad is not None
        assert (ours.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-7


@settings(max_examples=40, deadline=None)
@given(SEEDS, VOCABS)
def test_a_cache_that_holds_the_whole_vocabulary_says_the_same(seed: int, vocab: int) -> None:
    hidden_ND, head_VD, targets = _case(seed, vocab, k=vocab)
    head_VD[vocab:] = 0.0
    live = _fused("full_kl", hidden_ND, head_VD, targets, LossOptions())
    cached = _fused("decoupled_topk", hidden_ND, head_VD, replace(targets, live=None), LossOptions())
    # float32's head mass is 1 but for rounding; what is left is the student's padding, a rest the teacher has not
    for one, other in zip(live[1:], cached[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(SEEDS, VOCABS)
def test_it_is_no_less_than_the_forward_kl_of_a_cache(seed: int, vocab: int) -> None:
    hidden_ND, head_VD, targets = _case(seed, vocab, k=1 + seed % (vocab - 1))
    full, coarse = (_fused(name, hidden_ND, head_VD, targets, LossOptions())[0] for name in ("full_kl", "forward_kl"))
    assert coarse <= full + 1e-5


def test_the_loss_is_zero_without_gradient_where_the_student_is_the_teacher() -> None:
    hidden_ND, head_VD, targets = _case(1, 30)
    targets = replace(targets, live=LiveTeacher(hidden_ND, head_VD))
    loss, *gradients = _fused("full_kl", hidden_ND, head_VD, targets, LossOptions(2.0))
    assert loss.abs() < 1e-5 and all(one.abs().max() < 1e-5 for one in gradients)


def test_bfloat16_hidden_states_of_both_give_finite_values() -> None:
    hidden_ND, head_VD, targets = _case(2, 30)
    assert targets.live is not None
    live = LiveTeacher(targets.live.hidden_ND.bfloat16() * 100, targets.live.head_VD.bfloat16())
    found = _fused("full_kl", hidden_ND.bfloat16() * 100, head_VD, replace(targets, live=live), LossOptions())
    assert all(torch.isfinite(one).all() for one in found)


def test_without_a_live_teacher_the_error_says_so() -> None:
    hidden_ND, head_VD, targets = _case(2, 30)
    with pytest.raises(LmdistillError, match="needs a live teacher"):
        _fused("full_kl", hidden_ND, head_VD, replace(targets, live=None), LossOptions())
