"""Divergences over the whole vocabulary with a live teacher, against autograd in float64 and against a whole cache.

Axes: N positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, OPTIONS

from lmdistill.errors import LmdistillError
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LiveTeacher, LossOptions, Targets

N, WIDTH, TEACHER_WIDTH = 5, 8, 6
FULL = {f"full_{name}": name for name in ("reverse_kl", "js", "skew_kl", "skew_reverse_kl")}
NAMES = st.sampled_from(sorted(FULL))
SEEDS, VOCABS = st.integers(0, 10_000), st.integers(4, 40)


def _case(seed: int, vocab: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Hidden states, a head with padding, and a live teacher."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, teacher_ND = (torch.randn(N, width, generator=generator) for width in (WIDTH, TEACHER_WIDTH))
    live = LiveTeacher(teacher_ND, torch.randn(vocab, TEACHER_WIDTH, generator=generator))
    none_N0 = torch.zeros(N, 0)
    next_N = torch.randint(vocab, (N,), generator=generator)
    head_VD = torch.randn(vocab + padding, WIDTH, generator=generator)
    return hidden_ND, head_VD, Targets(next_N, none_N0.long(), none_N0, torch.zeros(N), live=live)


def _fused(
    name: str, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_ND, head_VD = hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()
    sums = fused_head_loss(hidden_ND, head_VD, targets, Mix(registry.get(name), options, 1.0, 0.0), chunk=2)
    sums.total.backward()
    assert hidden_ND.grad is not None and head_VD.grad is not None
    return sums.total.detach(), hidden_ND.grad, head_VD.grad


def test_every_live_loss_but_full_kl_is_held_to_these_properties_and_begins_with_full() -> None:
    live = {name for name, one in registry.catalogue().items() if one.signals == "live"}
    assert live == set(FULL) | {"full_kl"}
    assert live == {name for name in registry.catalogue() if name.startswith("full_")}  # what DistillConfig.live reads


LEAST = torch.tensor(torch.finfo(torch.float32).tiny).log().item()  # of an id that the teacher has not


@settings(max_examples=120, deadline=None)
@given(NAMES, SEEDS, VOCABS, st.integers(0, 3), OPTIONS)
def test_loss_and_gradients_are_within_1e5_of_float64_autograds(
    name: str, seed: int, vocab: int, padding: int, options: LossOptions
) -> None:
    """Ids that only the student has included: each by itself, with the smallest mass there is."""
    hidden_ND, head_VD, targets = _case(seed, vocab, padding)
    found = _fused(name, hidden_ND, head_VD, targets, options)
    assert targets.live is not None
    exact = hidden_ND.double().requires_grad_(), head_VD.double().requires_grad_()
    teacher = LiveTeacher(targets.live.hidden_ND.double(), targets.live.head_VD.double())
    log_p_NV, log_q_NV = teacher.logits().log_softmax(-1), (exact[0] @ exact[1].T).log_softmax(-1)
    log_p_NV = torch.nn.functional.pad(log_p_NV, (0, padding), value=LEAST)
    total = DIVERGENCES[FULL[name]](log_p_NV, log_q_NV, options).sum()
    total.backward()
    assert found[0].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-6)
    for ours, theirs in zip(found[1:], exact, strict=True):
        assert theirs.grad is not None
        assert (ours.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-7


@settings(max_examples=120, deadline=None)
@given(NAMES, SEEDS, VOCABS, st.integers(0, 1))
def test_a_top_k_of_the_whole_vocabulary_says_the_same(name: str, seed: int, vocab: int, padding: int) -> None:
    """Also of an id that only the student has: there it is the rest, which the teacher gives no mass.

    Of several such ids the rest is their sum, and a reverse KL is coarser by their own entropy: see the test above.
    """
    hidden_ND, head_VD, targets = _case(seed, vocab, padding)
    assert targets.live is not None
    logp_NV = targets.live.logits().log_softmax(-1)
    ids_NV = torch.arange(vocab).expand(N, -1)
    whole = replace(targets, ids_NK=ids_NV, logp_NK=logp_NV, tail_N=torch.full((N,), -torch.inf), live=None)
    live = _fused(name, hidden_ND, head_VD, targets, LossOptions())
    cells = _fused(FULL[name], hidden_ND, head_VD, whole, LossOptions())
    near = 0.03 if padding else 1e-4  # what the smallest mass is differs a little: it is taken before normalising there
    torch.testing.assert_close(live[0], cells[0], rtol=near, atol=1e-5)
    for one, other in zip(live[1:], cells[1:], strict=True):
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(one / scale, other / scale, rtol=near, atol=near if padding else 1e-5)


@pytest.mark.parametrize("name", sorted(FULL))
def test_the_loss_is_zero_without_gradient_where_the_student_is_the_teacher(name: str) -> None:
    hidden_ND, head_VD, targets = _case(1, 30)
    loss, *gradients = _fused(
        name, hidden_ND, head_VD, replace(targets, live=LiveTeacher(hidden_ND, head_VD)), LossOptions()
    )
    assert loss.abs() < 1e-5 and all(one.abs().max() < 1e-5 for one in gradients)


@pytest.mark.parametrize("name", sorted(FULL))
def test_confident_models_in_bfloat16_give_finite_values(name: str) -> None:
    hidden_ND, head_VD, targets = _case(2, 30, padding=2)
    assert targets.live is not None
    live = LiveTeacher(targets.live.hidden_ND.bfloat16() * 100, targets.live.head_VD.bfloat16())
    found = _fused(name, hidden_ND.bfloat16() * 100, head_VD, replace(targets, live=live), LossOptions())
    assert all(torch.isfinite(one).all() for one in found)


def test_without_a_live_teacher_the_error_says_so() -> None:
    hidden_ND, head_VD, targets = _case(2, 30)
    with pytest.raises(LmdistillError, match="needs a live teacher"):
        _fused("full_reverse_kl", hidden_ND, head_VD, replace(targets, live=None), LossOptions())
