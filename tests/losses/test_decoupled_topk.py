"""The properties that define the tempered decoupled top-K loss, and the fused head against autograd.

Axes: N positions, V vocabulary, K cached entries, D hidden width.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import RecipeError
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, StudentSoftmax, Targets

CASES = st.tuples(st.integers(0, 10_000), st.integers(4, 40), st.floats(0.1, 8.0))


def _case(seed: int, vocab: int, spread: float, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Random teacher log-probs and student logits `[3, V]` in float64, with the teacher's top K."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV = torch.randn(3, vocab, generator=generator, dtype=torch.float64).mul(spread).log_softmax(-1)
    student_NV = torch.randn(3, vocab, generator=generator, dtype=torch.float64).mul(spread)
    k = k or 1 + seed % (vocab - 1)
    logp_NK, ids_NK = teacher_NV.topk(k)
    rest_NV = teacher_NV.scatter(1, ids_NK, -torch.inf)
    next_N = torch.randint(vocab, (3,), generator=generator)
    return teacher_NV, student_NV, Targets(next_N, ids_NK, logp_NK, rest_NV.logsumexp(-1))


def _softmax(logits_NV: torch.Tensor, targets: Targets) -> StudentSoftmax:
    rest_NV = logits_NV.scatter(1, targets.ids_NK, -torch.inf)
    return StudentSoftmax(
        logits_NV.gather(1, targets.ids_NK),
        logits_NV.gather(1, targets.next_N[:, None])[:, 0],
        logits_NV.logsumexp(-1),
        rest_NV.logsumexp(-1),
    )


def _terms(logits_NV: torch.Tensor, targets: Targets, options: LossOptions) -> registry.LossTerms:
    return registry.get("decoupled_topk")(_softmax(logits_NV, targets), targets, options)


def _kl(log_p_N: torch.Tensor, log_q_N: torch.Tensor) -> torch.Tensor:
    return (log_p_N.exp() * (log_p_N - log_q_N)).nan_to_num(0.0).sum(-1)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_at_tau_one_it_is_the_kl_with_a_rest_bin_and_below_the_full_kl(case: tuple[int, int, float]) -> None:
    teacher_NV, student_NV, targets = _case(*case)
    loss_N = _terms(student_NV, targets, LossOptions()).loss_N
    student = _softmax(student_NV, targets)
    teacher_bins = torch.cat([targets.logp_NK, targets.tail_N[:, None]], 1)
    student_bins = torch.cat(
        [student.logits_NK - student.lse_N[:, None], (student.lse_rest_N - student.lse_N)[:, None]], 1
    )
    assert torch.allclose(loss_N, _kl(teacher_bins, student_bins), atol=1e-10)
    assert (loss_N <= _kl(teacher_NV, student_NV.log_softmax(-1)) + 1e-10).all()
    assert (loss_N >= -1e-12).all()


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_it_is_the_full_kl_where_k_is_the_vocabulary(case: tuple[int, int, float]) -> None:
    teacher_NV, student_NV, targets = _case(*case, k=case[1])
    loss_N = _terms(student_NV, targets, LossOptions()).loss_N
    assert torch.allclose(loss_N, _kl(teacher_NV, student_NV.log_softmax(-1)), atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(CASES, st.floats(0.5, 4.0))
def test_it_is_zero_without_gradient_where_student_is_teacher(case: tuple[int, int, float], tau: float) -> None:
    teacher_NV, _, targets = _case(*case)
    terms = _terms(teacher_NV + 3.0, targets, LossOptions(temperature=tau))
    assert terms.loss_N.abs().max() < 1e-12
    assert terms.outside_N.abs().max() < 1e-9 and terms.inside_NS.abs().max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(CASES, st.floats(0.5, 4.0), st.booleans(), st.booleans())
def test_closed_form_gradient_is_autograds(
    case: tuple[int, int, float], tau: float, weighted: bool, scaled: bool
) -> None:
    _, student_NV, targets = _case(*case)
    options = LossOptions(tau, weighted, scaled)
    student_NV.requires_grad_()
    (expected_NV,) = torch.autograd.grad(_terms(student_NV, targets, options).loss_N.sum(), student_NV)
    terms = _terms(student_NV.detach(), targets, options)
    actual_NV = terms.outside_N[:, None] * student_NV.detach().softmax(-1)
    actual_NV.scatter_(1, terms.ids_NS, terms.inside_NS)
    assert torch.allclose(actual_NV, expected_NV, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(CASES, st.integers(1, 4), st.floats(0.0, 1.0))
def test_fused_head_equals_autograd_of_the_naive_loss(case: tuple[int, int, float], chunk: int, lam: float) -> None:
    seed, vocab, spread = case
    _, _, targets = _case(seed, vocab, spread)
    targets = Targets(targets.next_N, targets.ids_NK, targets.logp_NK.float(), targets.tail_N.float())
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(3, 8, generator=generator, requires_grad=True)
    head_VD = torch.randn(vocab, 8, generator=generator, requires_grad=True)
    mix = Mix(registry.get("decoupled_topk"), LossOptions(2.0), lam, 1 - lam)
    fused_head_loss(hidden_ND, head_VD, targets, mix, chunk).total.mul(0.5).backward()

    wide = Targets(targets.next_N, targets.ids_NK, targets.logp_NK.double(), targets.tail_N.double())
    hidden = hidden_ND.detach().double().requires_grad_()
    head = head_VD.detach().double().requires_grad_()
    logits = hidden @ head.T
    kd = _terms(logits, wide, LossOptions(2.0)).loss_N.sum()
    ce = torch.nn.functional.cross_entropy(logits, targets.next_N, reduction="sum")
    ((lam * kd + (1 - lam) * ce) * 0.5).backward()
    for ours, exact in ((hidden_ND.grad, hidden.grad), (head_VD.grad, head.grad)):
        assert ours is not None and exact is not None
        assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-7


def test_a_confident_teacher_keeps_its_digits() -> None:
    """At P = 1 − 1e-9 the gradient of the mass comes from the rests, not from `1 − sum`."""
    logits_NV = torch.tensor([[22.0, 1.0, 0.0, -1.0]])
    logp_NV = logits_NV.double().log_softmax(-1)
    targets = Targets(
        torch.tensor([0]), torch.tensor([[0]]), logp_NV[:, :1].float(), logp_NV[:, 1:].logsumexp(-1).float()
    )
    terms = _terms(logits_NV, targets, LossOptions())
    assert terms.loss_N.abs().item() < 1e-12
    assert terms.outside_N.abs().item() < 1e-5


def test_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'decoupled_topk'"):
        registry.get("decopled_topk")
