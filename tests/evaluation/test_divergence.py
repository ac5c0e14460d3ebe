"""NLL, KL and top-1 agreement equal their definitions computed plainly in float64, and resolve what is tiny."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.evaluation import divergence


def plain_log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted_NV = logits_NV.astype(np.float64) - logits_NV.max(-1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(-1, keepdims=True))


cases = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 300), st.floats(1e-3, 30), st.floats(0, 30)
)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_measures_equal_their_definitions(case: tuple[int, int, int, float, float]) -> None:
    """For logits of any scale: nll, KL and top-1 are those of a float64 computation straight from the definition."""
    seed, rows, vocabulary, scale, shift = case
    rng = np.random.default_rng(seed)
    p_NV = (scale * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    x_NV = (p_NV + shift * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    targets_N = rng.integers(0, vocabulary, rows)
    log_p_NV, log_x_NV = plain_log_softmax(p_NV), plain_log_softmax(x_NV)
    ours_p_NV = divergence.log_softmax_in_place(torch.from_numpy(p_NV.copy()))
    ours_x_NV = divergence.log_softmax_in_place(torch.from_numpy(x_NV.copy()))

    nll_N = divergence.nll(ours_x_NV, torch.from_numpy(targets_N)).numpy()
    np.testing.assert_allclose(nll_N, -log_x_NV[np.arange(rows), targets_N], rtol=1e-6, atol=3e-6)
    kl_N = (np.exp(log_p_NV) * (log_p_NV - log_x_NV)).sum(-1)
    np.testing.assert_allclose(divergence.kl(ours_p_NV, ours_x_NV).numpy(), kl_N, rtol=2e-5, atol=1e-10)
    agree_N = divergence.agrees(ours_p_NV, ours_x_NV).numpy()
    np.testing.assert_array_equal(agree_N, p_NV.argmax(-1) == x_NV.argmax(-1))


def test_a_model_against_itself_is_exactly_zero() -> None:
    log_p_NV = divergence.log_softmax_in_place(4 * torch.randn(50, 49_152))
    assert float(divergence.kl(log_p_NV, log_p_NV.clone()).abs().max()) == 0.0


def test_a_tiny_divergence_is_not_noise() -> None:
    """Two models whose logits differ by 1e-3, so by a mean KL of about 5e-7, are told apart to four digits."""
    torch.manual_seed(0)
    logits_NV = 4 * torch.randn(64, 49_152)
    other_NV = logits_NV + 1e-3 * torch.randn_like(logits_NV)
    exact_p_NV, exact_x_NV = logits_NV.double().log_softmax(-1), other_NV.double().log_softmax(-1)
    exact_N = (exact_p_NV.exp() * (exact_p_NV - exact_x_NV)).sum(-1)
    ours_N = divergence.kl(divergence.log_softmax_in_place(logits_NV), divergence.log_softmax_in_place(other_NV))
    assert 1e-7 < float(exact_N.mean()) < 1e-6
    np.testing.assert_allclose(ours_N.mean(), exact_N.mean(), rtol=1e-4)


def test_impossible_tokens() -> None:
    """A token that p rules out costs nothing, even where x rules it out too; one that only x rules out, everything."""
    minus = -float("inf")
    log_p_NV = torch.tensor([[0.0, minus, minus], [minus, np.log(0.5), np.log(0.5)]], dtype=torch.float32)
    log_x_NV = torch.tensor([[np.log(0.5), np.log(0.5), minus], [0.0, minus, minus]], dtype=torch.float32)
    kl_N = divergence.kl(log_p_NV, log_x_NV)
    np.testing.assert_allclose(float(kl_N[0]), np.log(2), rtol=1e-6)
    assert float(kl_N[1]) == float("inf")


@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_the_standard_error_is_a_cluster_jackknife_to_first_order(seed: int, rows: int) -> None:
    """With rows of one length it is the textbook standard error of the mean of the rows' means."""
    rng = np.random.default_rng(seed)
    sums_R = rng.normal(30, 4, rows)
    ratio, error = divergence.ratio_and_error(sums_R, np.full(rows, 10))
    np.testing.assert_allclose(ratio, (sums_R / 10).mean())
    assert error is not None
    np.testing.assert_allclose(error, (sums_R / 10).std(ddof=1) / np.sqrt(rows))


def test_one_row_has_no_standard_error() -> None:
    assert divergence.ratio_and_error([6.0], [3]) == (2.0, None)
