"""The sampled loss: in the mean over draws its gradient is the full KL's, exactly and by many draws; top-K's is not.

Axes: N positions, V vocabulary, n draws, K entries, D hidden width, M repetitions of drawing.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import LmdistillError
from lmdistill.losses import registry
from lmdistill.losses.fused_head import Mix, fused_head_loss
from lmdistill.losses.registry import LossOptions, LossTerms, StudentSoftmax, Targets
from lmdistill.teachers.draws import draw

CASES = st.tuples(st.integers(0, 10_000), st.integers(3, 40), st.floats(0.1, 6.0))
STANDARD_ERRORS = 5.0  # a right estimator is outside of this once in two million entries


def _pair(seed: int, vocab: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random teacher log-probs and student logits `[V]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher_V = torch.randn(vocab, generator=generator, dtype=torch.float64).mul(spread).log_softmax(-1)
    return teacher_V, torch.randn(vocab, generator=generator, dtype=torch.float64).mul(spread)


def _targets(teacher_V: torch.Tensor, ids_NK: torch.Tensor, weight_NK: torch.Tensor | None) -> Targets:
    """Cached entries of a teacher; where nothing was drawn (weight 0) the entry is absent and repeats the first id."""
    logp_NK = teacher_V[ids_NK]
    if weight_NK is not None:
        logp_NK = logp_NK.masked_fill(weight_NK == 0, -torch.inf)
        ids_NK = ids_NK.where(weight_NK > 0, ids_NK[:, :1])
    held_NV = torch.zeros(len(ids_NK), len(teacher_V), dtype=torch.bool).scatter_(1, ids_NK, True)
    tail_N = teacher_V.expand_as(held_NV).masked_fill(held_NV, -torch.inf).logsumexp(-1)
    return Targets(torch.zeros(len(ids_NK), dtype=torch.long), ids_NK, logp_NK, tail_N, weight_NK)


def _terms(name: str, logits_V: torch.Tensor, targets: Targets, options: LossOptions) -> LossTerms:
    rows_NV = logits_V.expand(len(targets.ids_NK), -1)
    held_NV = torch.zeros(rows_NV.shape, dtype=torch.bool).scatter_(1, targets.ids_NK, True)
    student = StudentSoftmax(
        rows_NV.gather(1, targets.ids_NK).masked_fill(targets.absent_NK, -torch.inf),
        rows_NV.gather(1, targets.next_N[:, None])[:, 0],
        rows_NV.logsumexp(-1),
        rows_NV.masked_fill(held_NV, -torch.inf).logsumexp(-1),
    )
    return registry.get(name)(student, targets, options)


def _gradient(terms: LossTerms, logits_V: torch.Tensor) -> torch.Tensor:
    """The gradient in the logits `[N, V]` that the closed form stands for."""
    return (terms.outside_N[:, None] * logits_V.softmax(-1)).scatter(1, terms.ids_NS, terms.inside_NS)


def _full_gradient(teacher_V: torch.Tensor, logits_V: torch.Tensor) -> torch.Tensor:
    """Of KL(p‖q), by autograd."""
    logits = logits_V.clone().requires_grad_()
    (teacher_V.exp() * (teacher_V - logits.log_softmax(-1))).sum().backward()
    assert logits.grad is not None
    return logits.grad


def _top_k_renormalised(teacher_V: torch.Tensor, logits_V: torch.Tensor, k: int) -> torch.Tensor:
    """The gradient of cross-entropy to the teacher's top K scaled to sum to one: plain top-K distillation."""
    top = torch.zeros_like(teacher_V).scatter(0, teacher_V.topk(k).indices, teacher_V.topk(k).values.softmax(-1))
    return logits_V.softmax(-1) - top


def _weighted(ids: tuple[int, ...], ratio_V: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache holds of these draws: distinct ids and (c/n)·(p/r), padded to n entries."""
    distinct = sorted(set(ids))
    padded = distinct + [0] * (len(ids) - len(distinct))
    counts = torch.tensor([float(ids.count(i)) for i in distinct] + [0.0] * (len(ids) - len(distinct)))
    return torch.tensor([padded]), counts[None].double() / len(ids) * ratio_V[padded]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("draws", [1, 2])
def test_enumerated_draws_average_to_the_full_kl_and_its_gradient_and_top_k_does_not(draws, temperature):
    """Every outcome of n independent draws with its probability: equal to rounding. Top-K misses by far."""
    teacher_V, logits_V = _pair(3, 5)
    log_r_V = (temperature * teacher_V).log_softmax(-1)
    ratio_V = (teacher_V - log_r_V).exp()
    loss, gradient_V = 0.0, torch.zeros(5, dtype=torch.float64)
    for ids in itertools.product(range(5), repeat=draws):
        probability = log_r_V[list(ids)].sum().exp()
        terms = _terms("sampled_kd", logits_V, _targets(teacher_V, *_weighted(ids, ratio_V, 5)), LossOptions())
        loss += probability * terms.loss_N[0]
        gradient_V += probability * _gradient(terms, logits_V)[0]
    full_V = _full_gradient(teacher_V, logits_V)
    torch.testing.assert_close(gradient_V, full_V, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        loss, (teacher_V.exp() * (teacher_V - logits_V.log_softmax(-1))).sum(), atol=1e-12, rtol=0
    )
    for k in (1, 2, 3, 4):
        assert (_top_k_renormalised(teacher_V, logits_V, k) - full_V).abs().max() > 0.01


def test_stratified_draws_of_a_tiny_vocabulary_average_exactly():
    """Two draws, one from each half of the mass: integrated over both halves' uniforms on the grid of their steps."""
    teacher_V = torch.tensor([0.1, 0.25, 0.4, 0.05, 0.2], dtype=torch.float64).log()
    _, logits_V = _pair(4, 5)
    grid = (torch.arange(10, dtype=torch.float64) + 0.5) / 10  # the cumulative masses are multiples of 1/20
    uniforms_N2 = torch.cartesian_prod(grid, grid).add(torch.tensor([0.0, 1.0])).div(2)
    ids, logp, counts, log_z, *_ = draw(
        teacher_V.float().expand(100, -1), uniforms_N2, torch.zeros(100, dtype=torch.long), 1.0
    )
    targets = _targets(teacher_V, ids.long(), counts.double() / 2)
    mean_V = _gradient(_terms("sampled_kd", logits_V, targets, LossOptions()), logits_V).mean(0)
    torch.testing.assert_close(mean_V, _full_gradient(teacher_V, logits_V), atol=1e-12, rtol=0)
    torch.testing.assert_close(log_z, torch.zeros(100), atol=1e-6, rtol=0)
    torch.testing.assert_close(logp[counts > 0], teacher_V.float()[ids.long()][counts > 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_many_draws_average_to_the_full_gradient_within_their_standard_error_and_top_k_does_not(temperature):
    """4,000 times 12 draws from 1,000 ids: every entry of the mean gradient within 5 of its standard errors."""
    vocab, draws, repeats = 1_000, 12, 4_000
    teacher_V, logits_V = _pair(5, vocab, 2.0)
    uniforms_Mn = torch.from_numpy(np.random.default_rng(0).random((repeats, draws)))
    uniforms_Mn = (uniforms_Mn + torch.arange(draws)) / draws
    ids, logp, counts, log_z, *_ = draw(
        teacher_V.float().expand(repeats, -1), uniforms_Mn, torch.zeros(repeats, dtype=torch.long), temperature
    )
    ratio = ((1 - temperature) * logp + log_z[:, None]).exp().where(counts > 0, 0.0).double()
    targets = _targets(teacher_V, ids.long(), counts.double() / draws * ratio)
    gradient_MV = _gradient(_terms("sampled_kd", logits_V, targets, LossOptions()), logits_V)
    full_V = _full_gradient(teacher_V, logits_V)
    # A rare id's own spread is unknown until it comes: the spread that its probability gives is the least it can be.
    log_r_V = (temperature * teacher_V).log_softmax(-1)
    known_V = ((2 * teacher_V - log_r_V).exp() / draws).sqrt()
    error_V = torch.maximum(gradient_MV.std(0), known_V) / repeats**0.5
    assert ((gradient_MV.mean(0) - full_V).abs() / error_V).max() < STANDARD_ERRORS
    assert ((_top_k_renormalised(teacher_V, logits_V, draws) - full_V).abs() / error_V).max() > 10 * STANDARD_ERRORS


@settings(max_examples=40, deadline=None)
@given(CASES, st.booleans())
def test_closed_form_gradient_is_autograds(case: tuple[int, int, float], normalised: bool) -> None:
    seed, vocab, spread = case
    teacher_V, logits_V = _pair(seed, vocab, spread)
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.stack([torch.randperm(vocab, generator=generator)[:3] for _ in range(4)])
    weight_NK = torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.01
    weight_NK[1, 2] = weight_NK[3, 1:] = 0.0
    targets, options = _targets(teacher_V, ids_NK, weight_NK), LossOptions(self_normalised=normalised)
    logits = logits_V.clone().requires_grad_()
    log_q_NK = logits.log_softmax(-1)[targets.ids_NK]
    share_NK = weight_NK / weight_NK.sum(-1, keepdim=True) if normalised else weight_NK
    apart_NK = (teacher_V[targets.ids_NK] - log_q_NK).where(weight_NK > 0, 0.0)
    expected_N = (share_NK * apart_NK).sum(-1)
    terms = _terms("sampled_kd", logits_V, targets, options)
    torch.testing.assert_close(terms.loss_N, expected_N.detach(), atol=1e-10, rtol=0)
    for row in range(4):
        (expected_V,) = torch.autograd.grad(expected_N[row], logits, retain_graph=True)
        torch.testing.assert_close(_gradient(terms, logits_V)[row], expected_V, atol=1e-9, rtol=0)


@settings(max_examples=15, deadline=None)
@given(CASES, st.integers(1, 4), st.floats(0.0, 1.0), st.sampled_from(["sampled_kd", "decoupled_topk"]))
def test_fused_head_equals_autograd_of_the_naive_mix_with_absent_entries(
    case: tuple[int, int, float], chunk: int, lam: float, name: str
) -> None:
    """In float32 within the house's tolerance of float64; absent entries repeat an id and change nothing."""
    seed, vocab, spread = case
    teacher_V, _ = _pair(seed, vocab, spread)
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.stack([torch.randperm(vocab, generator=generator)[:3] for _ in range(3)])
    weight_NK = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    wide = _targets(teacher_V, ids_NK, weight_NK)
    narrow = Targets(wide.next_N, wide.ids_NK, wide.logp_NK.float(), wide.tail_N.float(), weight_NK.float())
    hidden_ND = torch.randn(3, 8, generator=generator, requires_grad=True)
    head_VD = torch.randn(vocab, 8, generator=generator, requires_grad=True)
    fused_head_loss(
        hidden_ND, head_VD, narrow, Mix(registry.get(name), LossOptions(), lam, 1 - lam), chunk
    ).total.backward()
    hidden, head = (part.detach().double().requires_grad_() for part in (hidden_ND, head_VD))
    logits_NV = hidden @ head.T
    kd = torch.stack([_naive(name, row, logits_NV[row], wide) for row in range(3)]).sum()
    ce = torch.nn.functional.cross_entropy(logits_NV, wide.next_N, reduction="sum")
    (lam * kd + (1 - lam) * ce).backward()
    for ours, exact in ((hidden_ND.grad, hidden.grad), (head_VD.grad, head.grad)):
        assert ours is not None and exact is not None
        assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-6


def _naive(name: str, row: int, logits_V: torch.Tensor, targets: Targets) -> torch.Tensor:
    """A loss of one position from its formula, over the entries that are there."""
    there = ~targets.absent_NK[row]
    ids, log_q_V = targets.ids_NK[row][there], logits_V.log_softmax(-1)
    logp, weight = targets.logp_NK[row][there], targets.weight_NK[row][there]
    if name == "sampled_kd":
        return (weight * (logp - log_q_V[ids])).sum()
    rest = torch.ones_like(logits_V, dtype=torch.bool).scatter(0, ids, False)
    tail_p, tail_q = targets.tail_N[row], log_q_V[rest].logsumexp(-1)
    return (logp.exp() * (logp - log_q_V[ids])).sum() + tail_p.exp() * (tail_p - tail_q)


def test_self_normalised_weights_are_biased_and_vary_less():
    """At t = 0.7 with 2 draws: the mean gradient is off by more than rounding, its spread is smaller."""
    teacher_V, logits_V = _pair(3, 5)
    log_r_V = (0.7 * teacher_V).log_softmax(-1)
    means, spreads = [], []
    for normalised in (False, True):
        rows, chances = [], []
        for ids in itertools.product(range(5), repeat=2):
            weighted = _weighted(ids, (teacher_V - log_r_V).exp(), 5)
            terms = _terms(
                "sampled_kd", logits_V, _targets(teacher_V, *weighted), LossOptions(self_normalised=normalised)
            )
            rows.append(_gradient(terms, logits_V)[0])
            chances.append(log_r_V[list(ids)].sum().exp())
        gradient_OV, chance_O1 = torch.stack(rows), torch.stack(chances)[:, None]
        means.append((chance_O1 * gradient_OV).sum(0))
        spreads.append((chance_O1 * (gradient_OV - means[-1]).square()).sum())
    assert (means[1] - means[0]).abs().max() > 1e-4
    assert spreads[1] < spreads[0]


def test_top_k_entries_without_weights_are_refused():
    teacher_V, logits_V = _pair(1, 6)
    targets = _targets(teacher_V, torch.tensor([[0, 1]]), None)
    with pytest.raises(LmdistillError, match="needs drawn ids with their weights"):
        _terms("sampled_kd", logits_V, targets, LossOptions())
