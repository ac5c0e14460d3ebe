"""Expected calibration error equals its definition, and the scorer gathers it over all held-out predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import World

from lmdistill.evaluation.calibration import BINS, Calibration


def from_the_definition(log_x_NV: np.ndarray, targets_N: np.ndarray) -> float:
    """Σ_b n_b/N · |accuracy_b − confidence_b|, bin by bin."""
    sure_N, right_N = np.exp(log_x_NV.astype(np.float64)).max(-1), log_x_NV.argmax(-1) == targets_N
    error = 0.0
    for low in range(BINS):
        inside_N = (sure_N > low / BINS) & (sure_N <= (low + 1) / BINS)
        if inside_N.any():
            error += inside_N.mean() * abs(right_N[inside_N].mean() - sure_N[inside_N].mean())
    return error


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(2, 40), st.floats(0.1, 8))
@settings(max_examples=60, deadline=None)
def test_it_equals_the_definition_however_it_is_gathered(seed: int, rows: int, vocabulary: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    log_x_NV = torch.from_numpy(scale * rng.standard_normal((rows, vocabulary))).float().log_softmax(-1)
    targets_N = torch.from_numpy(rng.integers(0, vocabulary, rows))
    gathered, cut = Calibration(), int(rng.integers(0, rows + 1))
    gathered.add(log_x_NV[:cut], targets_N[:cut])
    gathered.add(log_x_NV[cut:], targets_N[cut:])
    assert gathered.error() == pytest.approx(from_the_definition(log_x_NV.numpy(), targets_N.numpy()), abs=1e-6)


def test_a_model_that_says_what_it_knows_has_none_and_a_boaster_has_all() -> None:
    """Even odds and right half the time: 0. Certain and always wrong: 1."""
    honest, boaster = Calibration(), Calibration()
    honest.add(torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([0, 1]))
    boaster.add(torch.tensor([[1.0, 0.0], [1.0, 0.0]]).log(), torch.tensor([1, 1]))
    assert honest.error() == pytest.approx(0.0, abs=1e-7)
    assert boaster.error() == 1.0


def test_without_predictions_there_is_no_error() -> None:
    assert Calibration().error() is None


def test_the_scorer_gathers_every_heldout_prediction(world: World) -> None:
    from lmdistill.evaluation.heldout import read_heldout
    from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class
    from lmdistill.evaluation.scorer import score

    heldout = read_heldout(world.corpus.out, "valid", 10_000)
    model = runtime_class("transformers").open(world.teacher.path, RuntimeOptions(heldout.sequence_length), exact=True)
    gathered = Calibration()
    rows = score(model, heldout, calibration=gathered)
    assert int(gathered.counts_B.sum()) == heldout.predictions == sum(rows.predictions)
    error = gathered.error()
    assert error is not None and 0 < error < 1
