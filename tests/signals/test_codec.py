"""The code of log-probs: how far it may be from the truth, whatever the teacher says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_synthetic import random_rows

from lmdistill.signals.codec import CODES, Companding, code_kl, half_step_f16, logsumexp, renormalisation_bound

CODE = Companding()
shapes = st.tuples(st.integers(0, 2**32), st.sampled_from([1, 2, 8, 32, 64]), st.floats(0.01, 12.0))


def decoded(exact):
    code = CODE.encode(exact.logp_BTK, exact.tail_BT)
    logp = np.empty(exact.logp_BTK.shape, np.float32)
    CODE.decode(code.top1_N, code.gaps_NK, logp)
    return code, logp


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_kl_of_the_code_is_small(shape):
    """For any spread of the teacher and any K the code costs below 1e-4 nats on every token."""
    seed, k, scale = shape
    *_, exact = random_rows(seed, 2, 16, 200, k, scale)
    code, logp = decoded(exact)
    kl = code_kl(exact.logp_BTK, exact.tail_BT, logp, code.tail_N)
    assert kl.max() <= 1e-4
    assert kl.mean() <= 3e-5


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_head_and_tail_sum_to_one_and_entries_descend(shape):
    """Head + tail = 1 within what f16 can say of them; decoded entries never rise; nothing above log 1."""
    seed, k, scale = shape
    *_, exact = random_rows(seed, 2, 16, 200, k, scale)
    code, logp = decoded(exact)
    head, tail = np.exp(logsumexp(logp)), np.exp(code.tail_N.astype("f8"))
    f16 = head * half_step_f16(code.top1_N) + tail * half_step_f16(code.tail_N)
    assert (np.abs(head + tail - 1) <= f16 * 1.01 + 1e-6).all()
    assert (np.diff(logp, axis=-1) <= 0).all()
    assert (logp <= 0).all()


def test_k_is_the_vocabulary():
    """With K = V nothing is left: the tail is −inf and the head sums to one."""
    *_, exact = random_rows(1, 2, 8, 50, 50)
    code, logp = decoded(exact)
    assert np.isneginf(code.tail_N).all()
    np.testing.assert_allclose(np.exp(logsumexp(logp)), 1, atol=1e-3)


def test_a_certain_teacher():
    """P → 1: the tail keeps its own exponent instead of drowning in 1 − P."""
    logp = np.array([[-1e-9, -21.0, -25.0]], np.float32)
    code, out = decoded(type("Exact", (), {"logp_BTK": logp, "tail_BT": np.array([-26.5], "f4")}))
    assert code.tail_N[0] == np.float16(-26.5)
    assert out[0, 0] == pytest.approx(0, abs=1e-6)
    assert code.gaps_NK[0, 1] == CODES - 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 200), st.floats(0.1, 30))
def test_renormalisation_stays_below_its_bound(seed, k, span):
    """However the gaps lie, coding them moves log Σ exp(−gap) by no more than the bound the proof uses."""
    rng = np.random.default_rng(seed)
    gaps = np.sort(rng.uniform(0, span, (64, k - 1)) * rng.uniform(0, 1, (64, 1)), axis=-1).astype("f4")
    codes = np.searchsorted(CODE.edges_C, gaps)
    first = np.zeros((64, 1))
    exact, coded = logsumexp(np.hstack([first, -gaps])), logsumexp(np.hstack([first, -CODE.table_C[codes]]))
    assert np.abs(exact - coded).max() <= renormalisation_bound(CODE, k)


def test_each_code_is_nearest():
    """Coding a code's own value gives that code back, and no gap up to G is farther from its value than half a step."""
    assert (np.searchsorted(CODE.edges_C, CODE.table_C) == np.arange(CODES)).all()
    gaps = np.linspace(0, CODE.span, 100_001, dtype=np.float32)
    codes = np.searchsorted(CODE.edges_C, gaps)
    assert (np.abs(gaps - CODE.table_C[codes]) <= CODE.half_step_C[codes] + 1e-5).all()
