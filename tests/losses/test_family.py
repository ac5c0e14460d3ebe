"""Every loss on the teacher's top K and tail: its definition, its gradient, and what all of them have in common.

Axes: N positions, V vocabulary, K cached entries, C cells, D hidden width.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CASES,
    DEFINITIONS,
    DIVERGENCES,
    OPTIONS,
    N,
    cached,
    case,
    cells_of,
    defined,
    gradient,
    teacher_and_student,
    terms,
)

from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, Targets

NAMES = st.sampled_from(sorted(DEFINITIONS))
WIDTH = 8
Case = tuple[int, int, float]


def _fused(
    name: str, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: Targets, options: LossOptions, chunk: int = 2
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The fused head's loss and its gradients in hidden states and head."""
    hidden_ND, head_VD = hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()
    sums = fused_head_loss(hidden_ND, head_VD, targets, Mix(registry.get(name), options, 1.0, 0.0), chunk)
    sums.total.backward()
    assert hidden_ND.grad is not None and head_VD.grad is not None
    return sums.total.item(), hidden_ND.grad, head_VD.grad


def _weights(seed: int, vocab: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a head in float32 whose logits have about that spread."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, WIDTH, generator=generator)
    return hidden_ND, torch.randn(vocab, WIDTH, generator=generator) * spread / WIDTH**0.5


def _single(targets: Targets) -> Targets:
    return Targets(targets.next_N, targets.ids_NK, targets.logp_NK.float(), targets.tail_N.float())


def test_every_loss_on_a_top_k_cache_is_held_to_these_properties() -> None:
    known = {name for name, entry in registry.catalogue().items() if entry.signals == "top_k"}
    assert known == set(DEFINITIONS) | {"decoupled_topk"}  # whose properties are in test_decoupled_topk.py


@settings(max_examples=200, deadline=None)
@given(NAMES, CASES, OPTIONS)
def test_loss_and_closed_form_gradient_are_the_definitions_in_float64(
    name: str, drawn: Case, options: LossOptions
) -> None:
    _, student_NV, targets = case(*drawn)
    student_NV.requires_grad_()
    wanted_N = defined(name, student_NV, targets, options)
    (wanted_NV,) = torch.autograd.grad(wanted_N.sum(), student_NV)
    said = terms(name, student_NV.detach(), targets, options)
    torch.testing.assert_close(said.loss_N, wanted_N.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(said, student_NV.detach()), wanted_NV, rtol=1e-7, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(NAMES, CASES, OPTIONS)
def test_the_fused_heads_gradients_are_within_1e5_of_float64_autograds(
    name: str, drawn: Case, options: LossOptions
) -> None:
    targets = _single(case(*drawn)[2])
    weights = _weights(*drawn)
    loss, *found = _fused(name, *weights, targets, options)
    exact = [weight.double().requires_grad_() for weight in weights]
    wide = Targets(targets.next_N, targets.ids_NK, targets.logp_NK.double(), targets.tail_N.double())
    wanted = defined(name, exact[0] @ exact[1].T, wide, options).sum()
    wanted.backward()
    # a loss is a difference of log-probs of some size, so float32 leaves it absolute digits only
    assert loss == pytest.approx(wanted.item(), rel=1e-5, abs=5e-6)
    for ours, theirs in zip(found, exact, strict=True):
        assert theirs.grad is not None
        assert (ours.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-7


@settings(max_examples=100, deadline=None)
@given(NAMES, CASES, OPTIONS)
def test_the_gradient_sums_to_zero_over_the_vocabulary_and_a_shift_of_the_logits_changes_nothing(
    name: str, drawn: Case, options: LossOptions
) -> None:
    _, student_NV, targets = case(*drawn)
    said = terms(name, student_NV, targets, options)
    shifted = terms(name, student_NV + 7.0, targets, options)
    assert gradient(said, student_NV).sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(shifted.loss_N, said.loss_N, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(shifted, student_NV), gradient(said, student_NV), rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(NAMES, CASES, OPTIONS, st.floats(-2.0, 2.0))
def test_it_is_zero_without_gradient_where_the_cells_are_equal_whatever_the_rest_is_made_of(
    name: str, drawn: Case, options: LossOptions, mixing: float
) -> None:
    """The student has the teacher's cells, and another distribution inside the rest."""
    teacher_NV, student_NV, targets = case(*drawn)
    rest_NV = (teacher_NV + mixing * student_NV).scatter(1, targets.ids_NK, -torch.inf)
    rest_NV += targets.tail_N[:, None] - rest_NV.logsumexp(-1, keepdim=True)
    equal_NV = rest_NV.scatter(1, targets.ids_NK, targets.logp_NK) + 3.0
    said = terms(name, equal_NV, targets, options)
    assert said.loss_N.abs().max() < 1e-12
    if name != "total_variation":  # its gradient is a step there
        assert gradient(said, equal_NV).abs().max() < 1e-12


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted({*DIVERGENCES, "bd_kd"})), CASES, OPTIONS)
def test_it_is_above_zero_where_the_cells_differ_by_pinskers_inequality(
    name: str, drawn: Case, options: LossOptions
) -> None:
    _, student_NV, targets = case(*drawn)
    apart_N = DIVERGENCES["total_variation"](*cells_of(student_NV, targets), options)
    share = {
        "js": options.js_beta * (1 - options.js_beta),
        "skew_kl": (1 - options.skew_alpha) ** 2,
        "skew_reverse_kl": (1 - options.skew_alpha) ** 2,
    }.get(name, 1.0)
    least_N = apart_N if name == "total_variation" else 2 * share * apart_N**2
    assert (terms(name, student_NV, targets, options).loss_N >= least_N - 1e-12).all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DIVERGENCES)), CASES, OPTIONS)
def test_coarsening_makes_no_divergence_larger(name: str, drawn: Case, options: LossOptions) -> None:
    """The data-processing inequality: on K+1 cells ≤ on fewer ids in the rest ≤ over the vocabulary."""
    teacher_NV, student_NV, targets = case(*drawn)
    k = targets.ids_NK.shape[1]
    finer = cached(teacher_NV, min(k + 2, drawn[1] - 1))
    coarse_N, finer_N = (terms(name, student_NV, one, options).loss_N for one in (targets, finer))
    full_N = DIVERGENCES[name](teacher_NV, student_NV.log_softmax(-1), options)
    assert (coarse_N <= finer_N + 1e-12).all() and (finer_N <= full_N + 1e-12).all()


@settings(max_examples=80, deadline=None)
@given(NAMES, CASES, OPTIONS)
def test_where_k_is_the_vocabulary_there_is_no_rest_and_the_loss_is_the_full_one(
    name: str, drawn: Case, options: LossOptions
) -> None:
    teacher_NV, student_NV = teacher_and_student(*drawn)
    targets = cached(teacher_NV, drawn[1])
    assert (targets.tail_N == -torch.inf).all()
    student_NV.requires_grad_()
    definition = "topk_rest_bucket" if name == "topk_renormalised" else name  # that one leaves the last cell out
    wanted_N = DEFINITIONS[definition](teacher_NV, student_NV.log_softmax(-1), options)
    (wanted_NV,) = torch.autograd.grad(wanted_N.sum(), student_NV)
    said = terms(name, student_NV.detach(), targets, options)
    torch.testing.assert_close(said.loss_N, wanted_N.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(said, student_NV.detach()), wanted_NV, rtol=1e-7, atol=1e-12)
    assert torch.isfinite(said.outside_N).all()


@settings(max_examples=60, deadline=None)
@given(NAMES, CASES, OPTIONS, st.integers(1, 4))
def test_the_chunk_changes_nothing_but_rounding(name: str, drawn: Case, options: LossOptions, chunk: int) -> None:
    targets, weights = _single(case(*drawn)[2]), _weights(*drawn)
    whole, parts = (_fused(name, *weights, targets, options, chunk=size) for size in (N, chunk))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    for one, other in zip(whole[1:], parts[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(NAMES, CASES, OPTIONS)
def test_absent_entries_contribute_nothing(name: str, drawn: Case, options: LossOptions) -> None:
    """Positions with 1, 2, … entries in one batch: each as if it stood alone with its own K."""
    teacher_NV, student_NV, targets = case(*drawn)
    entries = targets.ids_NK.shape[1]
    counts = [1 + n % entries for n in range(N)]
    alone = [cached(teacher_NV, count, drawn[0]).rows(slice(n, n + 1)) for n, count in enumerate(counts)]
    ids_NK, logp_NK = targets.ids_NK[:, :1].repeat(1, entries), torch.full_like(targets.logp_NK, -torch.inf)
    for n, (one, count) in enumerate(zip(alone, counts, strict=True)):
        ids_NK[n, :count], logp_NK[n, :count] = one.ids_NK[0], one.logp_NK[0]
    together = Targets(targets.next_N, ids_NK, logp_NK, torch.cat([one.tail_N for one in alone]))
    said = terms(name, student_NV, together, options)
    for n, one in enumerate(alone):
        single = terms(name, student_NV[n : n + 1], one, options)
        torch.testing.assert_close(said.loss_N[n : n + 1], single.loss_N, rtol=1e-9, atol=1e-12)
        found_V, wanted_V = gradient(said, student_NV)[n], gradient(single, student_NV[n : n + 1])[0]
        torch.testing.assert_close(found_V, wanted_V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_bfloat16_inputs_give_finite_losses_and_gradients_however_sure_the_student_is(name: str, spread: float) -> None:
    for seed in range(4):
        targets = _single(case(seed, 40, min(spread, 30.0))[2])
        hidden_ND, head_VD = _weights(seed, 40, spread)
        loss, *gradients = _fused(name, hidden_ND.bfloat16(), head_VD, targets, LossOptions(temperature=2.0))
        assert torch.isfinite(torch.tensor(loss)) and loss > -1e-6
        assert all(torch.isfinite(one).all() for one in gradients)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_at_tau_one_the_rest_bucket_is_the_decoupled_loss_and_the_forward_kl(drawn: Case) -> None:
    _, student_NV, targets = case(*drawn)
    bucket, *others = (
        terms(name, student_NV, targets, LossOptions()) for name in ("topk_rest_bucket", "decoupled_topk", "forward_kl")
    )
    for other in others:
        torch.testing.assert_close(bucket.loss_N, other.loss_N, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient(bucket, student_NV), gradient(other, student_NV), rtol=1e-7, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_js_and_the_skew_ones_tend_to_forward_and_reverse_kl(drawn: Case) -> None:
    seed, vocab, spread = drawn
    _, student_NV, targets = case(seed, vocab, min(spread, 1.0))
    ahead_N, back_N = (terms(name, student_NV, targets, LossOptions()).loss_N for name in ("forward_kl", "reverse_kl"))
    small = 1e-7

    def limit(name: str, options: LossOptions, scale: float) -> torch.Tensor:
        return terms(name, student_NV, targets, options).loss_N / scale

    near = {"rtol": 1e-3, "atol": 1e-7}
    torch.testing.assert_close(limit("js", LossOptions(js_beta=small), small), ahead_N, **near)
    torch.testing.assert_close(limit("js", LossOptions(js_beta=1 - small), small), back_N, **near)
    torch.testing.assert_close(limit("skew_kl", LossOptions(skew_alpha=small), 1.0), ahead_N, **near)
    torch.testing.assert_close(limit("skew_reverse_kl", LossOptions(skew_alpha=small), 1.0), back_N, **near)


@pytest.mark.parametrize(("student_spread", "leading"), [(4.0, "forward_kl"), (0.25, "reverse_kl")])
def test_bd_kd_leans_to_forward_kl_where_the_student_is_sharper_and_else_to_reverse_kl(
    student_spread: float, leading: str
) -> None:
    teacher_NV, _ = teacher_and_student(3, 20, 1.0)
    targets, student_NV = cached(teacher_NV, 6), teacher_NV * student_spread
    all_N = terms("bd_kd", student_NV, targets, LossOptions(bd_weight=1.0)).loss_N
    torch.testing.assert_close(all_N, terms(leading, student_NV, targets, LossOptions()).loss_N)
    half_N = terms("bd_kd", student_NV, targets, LossOptions(bd_weight=0.5)).loss_N
    both = [terms(name, student_NV, targets, LossOptions()).loss_N for name in ("forward_kl", "reverse_kl")]
    torch.testing.assert_close(half_N, (both[0] + both[1]) / 2)


def test_a_student_sure_of_the_teachers_token_keeps_the_digits_of_its_gradient() -> None:
    """Where p and q are 1 − 1e-6 and 1 − 3e-6, float32's q − p has no digit; the closed forms have five."""
    logits_NV = torch.tensor([[40.0, 40.0 - 12.716, 20.0, 18.0]])
    logp_NV = torch.tensor([[0.0, -13.815, -17.0, -19.0]], dtype=torch.float64).log_softmax(-1)
    targets = Targets(torch.tensor([0]), torch.tensor([[0, 1]]), logp_NV[:, :2], logp_NV[:, 2:].logsumexp(-1))
    for name in sorted(DEFINITIONS):
        wide_NV = logits_NV.double().requires_grad_()
        (wanted_NV,) = torch.autograd.grad(defined(name, wide_NV, targets, LossOptions()).sum(), wide_NV)
        said = terms(name, logits_NV, _single(targets), LossOptions())
        outside_NV = said.outside_N.double()[:, None] * logits_NV.double().softmax(-1)
        found_NV = outside_NV.scatter(1, said.ids_NS, said.inside_NS.double())
        assert (found_NV - wanted_NV).abs().max() <= 2e-5 * wanted_NV.abs().max(), name


def test_a_loss_says_which_options_it_reads() -> None:
    changed = LossOptions(temperature=2.0, js_beta=0.3, bd_weight=0.6)
    assert registry.unread_options("js", changed) == ["temperature", "bd_weight"]
    assert registry.unread_options("topk_rest_bucket", changed) == ["js_beta", "bd_weight"]
    assert registry.unread_options("ce", LossOptions()) == []
