"""Losses on hidden states: what they are blind to, what masks leave out, and the bound on mutual information."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.intermediate.cka import linear_cka
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.intermediate.mi_alpha import interpolated_bound
from lmdistill.intermediate.registry import Positions, Sides, catalogue, entry

HIDDEN = [name for name, one in catalogue().items() if one.reads in ("hidden", "block")]
LEARNED = ("mi_alpha",)


def _made(name: str, student: int = 6, teacher: int = 6, **keys: object) -> torch.nn.Module:
    torch.manual_seed(0)
    module: torch.nn.Module = entry(name).make(
        Sides(student, teacher), IntermediateKeys.model_validate({"loss": name, **keys})
    )
    return module.double()


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rotation(width: int, seed: int) -> torch.Tensor:
    rotation, _ = torch.linalg.qr(_random(width, width, seed=seed))
    return rotation


COUNTS = torch.tensor([[True] * 7 + [False] * 2, [False, True, True, True, False, True, False, True, True]])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(3, 14), st.integers(2, 9), st.integers(2, 9), st.floats(0.01, 100.0), st.data()
)
def test_cka_is_blind_to_rotations_scales_and_shifts_of_either_side(
    seed: int, length: int, one: int, other: int, scale: float, data: st.DataObject
) -> None:
    x_RTD, y_RTE = _random(2, length, one, seed=seed), _random(2, length, other, seed=seed + 1)
    counts_RT = torch.ones(2, length, dtype=torch.bool)
    counts_RT[1, : data.draw(st.integers(0, length - 2))] = False
    expected_R = linear_cka(x_RTD, y_RTE, counts_RT)
    moved_RTE = scale * y_RTE @ _rotation(other, seed + 2) + _random(other, seed=seed + 3)
    torch.testing.assert_close(linear_cka(x_RTD, moved_RTE, counts_RT), expected_R)
    torch.testing.assert_close(linear_cka(x_RTD @ _rotation(one, seed), y_RTE, counts_RT), expected_R)
    own_R = linear_cka(x_RTD, x_RTD * scale, counts_RT)
    torch.testing.assert_close(own_R, torch.ones_like(own_R))
    assert ((expected_R >= 0) & (expected_R <= 1 + 1e-9)).all()


def test_cka_is_the_same_through_positions_and_through_widths() -> None:
    """Few positions go by T×T products, many by D×D: the definition, both times."""
    for length in (5, 40):
        x_TD, y_TE = _random(length, 6), _random(length, 8, seed=1)
        x_c, y_c = x_TD - x_TD.mean(0), y_TE - y_TE.mean(0)
        expected = (x_c.T @ y_c).norm() ** 2 / ((x_c.T @ x_c).norm() * (y_c.T @ y_c).norm())
        found = linear_cka(x_TD[None], y_TE[None], torch.ones(1, length, dtype=torch.bool))
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_does_not_count_changes_nothing_and_gets_no_gradient(name: str) -> None:
    module, teacher_RTD = _made(name), _random(2, 9, 6, seed=1)
    student_RTD = _random(2, 9, 6).requires_grad_()
    loss = module(student_RTD, teacher_RTD, Positions(COUNTS))
    loss.backward()
    assert (student_RTD.grad[~COUNTS] == 0).all() and (student_RTD.grad[COUNTS] != 0).any()
    garbage = torch.where(COUNTS[..., None], 0.0, 50.0)
    moved = module(student_RTD + garbage, teacher_RTD - garbage, Positions(COUNTS))
    assert moved.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in HIDDEN if name not in LEARNED])
def test_a_student_with_the_teachers_states_loses_nothing(name: str) -> None:
    teacher_RTD = _random(2, 9, 6)
    assert _made(name)(teacher_RTD, teacher_RTD, Positions(COUNTS)).item() == pytest.approx(0, abs=1e-9)
    assert _made(name)(_random(2, 9, 6, seed=3), teacher_RTD, Positions(COUNTS)).item() > 1


@pytest.mark.parametrize("name", ["hidden_cosine", "hidden_cka", "mi_alpha"])
@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100.0))
def test_lengths_of_states_do_not_matter_where_the_loss_says_so(name: str, scale: float) -> None:
    module, lengths = _made(name), _random(2, 9, 1, seed=5).exp() * scale
    student_RTD, teacher_RTD = _random(2, 9, 6), _random(2, 9, 6, seed=1)
    plain = module(student_RTD, teacher_RTD, Positions(COUNTS)).item()
    assert module(student_RTD * lengths, teacher_RTD, Positions(COUNTS)).item() == pytest.approx(plain, rel=1e-6)


def test_hidden_mse_is_a_share_of_the_teachers_length_or_a_plain_mean() -> None:
    student_RTD, teacher_RTD = _random(1, 3, 4), _random(1, 3, 4, seed=1)
    positions = Positions(torch.tensor([[True, False, True]]))
    error_T = (student_RTD - teacher_RTD).pow(2)[0]
    share = error_T.sum(-1) / teacher_RTD[0].pow(2).sum(-1)
    relative = _made("hidden_mse")(student_RTD, teacher_RTD, positions).item()
    assert relative == pytest.approx((share[0] + share[2]).item(), rel=1e-6)
    plain = _made("hidden_mse", relative=False)(student_RTD, teacher_RTD, positions).item()
    assert plain == pytest.approx((error_T[0].mean() + error_T[2].mean()).item(), rel=1e-9)


@pytest.mark.parametrize("name", HIDDEN)
def test_every_state_loss_has_its_own_gradient_by_finite_differences(name: str) -> None:
    module = _made(name)
    teacher_RTD = _random(2, 9, 6, seed=1)

    def loss(student_RTD: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = module(student_RTD, teacher_RTD, Positions(COUNTS))
        return value

    student_RTD, way_RTD = _random(2, 9, 6).requires_grad_(), _random(2, 9, 6, seed=7)
    (grad_RTD,) = torch.autograd.grad(loss(student_RTD), student_RTD)
    step = 1e-3 if name in ("hidden_mse", "block_local") else 1e-6  # those two are quadratic, and sum in float32
    with torch.no_grad():
        ahead, behind = loss(student_RTD + step * way_RTD), loss(student_RTD - step * way_RTD)
    slope = ((ahead - behind) / (2 * step)).item()
    assert slope == pytest.approx((grad_RTD * way_RTD).sum().item(), rel=2e-3 if step == 1e-3 else 1e-6)


def test_other_widths_get_a_learned_map_and_equal_ones_only_if_asked() -> None:
    for name in ("hidden_mse", "hidden_cosine"):
        assert not list(_made(name).parameters())
        for module, shape in ((_made(name, 4, 6), (6, 4)), (_made(name, projection=True), (6, 6))):
            (weight,) = module.parameters()
            assert weight.shape == shape
            gram = weight.T @ weight
            torch.testing.assert_close(gram, torch.eye(shape[1], dtype=gram.dtype), atol=1e-6, rtol=0)


def _gaussian(count: int, width: int, information: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Pairs whose mutual information is known: `width` independent pairs of correlation ρ."""
    rho = math.sqrt(1 - math.exp(-2 * information / width))
    x_ND, noise_ND = _random(count, width, seed=seed), _random(count, width, seed=seed + 1)
    return x_ND, rho * x_ND + math.sqrt(1 - rho**2) * noise_ND, rho


def _log_ratio(x_ND: torch.Tensor, y_ND: torch.Tensor, rho: float) -> torch.Tensor:
    """log p(y|x) / p(y) of every pair `[N, N]`."""
    error_NN = (y_ND[None] - rho * x_ND[:, None]).pow(2).sum(-1) / (1 - rho**2)
    width = x_ND.shape[1]
    return 0.5 * (y_ND.pow(2).sum(-1)[None] - error_NN) - width / 2 * math.log(1 - rho**2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_with_the_true_ratio_as_critic_the_bound_is_the_known_mutual_information(alpha: float) -> None:
    bounds = []
    for seed in range(8):
        x_ND, y_ND, rho = _gaussian(400, 4, 1.5, 10 * seed)
        scores = _log_ratio(x_ND, y_ND, rho)[None]
        counts = torch.ones(1, 400, dtype=torch.bool)
        bounds.append(interpolated_bound(scores, torch.zeros(1, 400), counts, alpha).item())
    assert sum(bounds) / 8 == pytest.approx(1.5, abs=0.1)


def test_with_all_samples_the_bound_is_at_most_the_logarithm_of_their_number() -> None:
    x_ND, y_ND, rho = _gaussian(12, 8, 9.0, 0)
    bound = interpolated_bound(
        _log_ratio(x_ND, y_ND, rho)[None], torch.zeros(1, 12), torch.ones(1, 12, dtype=torch.bool), 1.0
    )
    assert 0.9 * math.log(11) < bound.item() <= math.log(11)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_the_bound_is_finite_with_finite_gradients_for_scores_of_any_size(alpha: float) -> None:
    for size in (1e-3, 10.0, 1e3 if alpha else 20.0):  # at α = 0 its last term is e^f itself
        scores = (size * _random(2, 9, 9)).float().requires_grad_()
        baseline = _random(2, 9, seed=2).float().requires_grad_()
        bound_R = interpolated_bound(scores, baseline, COUNTS, alpha)
        bound_R.sum().backward()
        assert torch.isfinite(bound_R).all() and torch.isfinite(scores.grad).all()
        assert torch.isfinite(baseline.grad).all()


def test_rows_of_fewer_than_three_positions_say_nothing() -> None:
    counts = torch.tensor([[True, True, False, False], [False] * 4])
    scores = _random(2, 4, 4).requires_grad_()
    bound_R = interpolated_bound(scores, torch.zeros(2, 4, dtype=torch.float64), counts, 0.9)
    bound_R.sum().backward()
    assert (bound_R == 0).all() and (scores.grad == 0).all()


def test_a_learned_critic_comes_near_the_known_mutual_information_from_below() -> None:
    torch.manual_seed(0)
    keys = IntermediateKeys(loss="mi_alpha", critic_width=32)
    module = entry("mi_alpha").make(Sides(16, 16), keys)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    counts = torch.ones(1, 256, dtype=torch.bool)
    bounds = []
    for step in range(150):
        x_ND, y_ND, _ = _gaussian(256, 16, 2.0, 100_000 + 2 * step)
        loss = module(x_ND[None].float(), y_ND[None].float(), Positions(counts)) / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(-loss.item())
    assert bounds[0] < 0.2
    assert 1.4 < sum(bounds[-30:]) / 30 < 2.1
