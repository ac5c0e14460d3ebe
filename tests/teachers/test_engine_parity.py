"""The proof of an engine: rounding passes, anything else is refused, whatever the ids they share."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers_toys import VOCAB, save_toy

from lmdistill.errors import IntegrityError
from lmdistill.teachers.engine import EngineOptions, TopK
from lmdistill.teachers.engine_parity import FLOAT32_BOUND, Proof, compare, open_reference, prove
from lmdistill.teachers.reduction import reduce_logits
from lmdistill.teachers.registry import create_engine

ROWS, LENGTH, K = 2, 12, 6
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
STARTS = np.zeros((ROWS, LENGTH), bool)


def top(logits, k=K):
    rows = ROWS * LENGTH
    following = torch.from_numpy(np.roll(TOKENS, -1, axis=1)).flatten().long()
    ids, logp, tail, lp_next = (part.numpy() for part in reduce_logits(logits.reshape(rows, -1), following, k))
    lp_next = lp_next.reshape(ROWS, LENGTH).copy()
    lp_next[:, -1] = np.nan
    return TopK(ids.reshape(ROWS, LENGTH, k), logp.reshape(ROWS, LENGTH, k), tail.reshape(ROWS, LENGTH), lp_next)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), noise=st.floats(0, 0.2))
def test_the_difference_is_never_more_than_what_was_done_to_the_logits(seed, noise):
    """Logits moved by at most ε move log-probs by at most 2ε: so says the measure, also where ids change places."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS * LENGTH, VOCAB, generator=generator)
    moved = logits + (torch.rand(logits.shape, generator=generator) * 2 - 1) * noise
    figures = compare(top(moved), top(logits), bound=1.0)
    assert figures["max_delta_logprob"] <= 2 * noise + 1e-5
    assert figures["tail_mass"] <= np.expm1(2 * noise) + 1e-5
    assert figures["common_ids"] > 0


def test_no_common_id_is_refused():
    """Two engines that agree on no id have nothing to compare, and are as wrong as can be."""
    logits = torch.randn(ROWS * LENGTH, VOCAB) * 0.1
    one, other = logits.clone(), logits.clone()
    one[:, :K] += 5
    other[:, K : 2 * K] += 5
    with pytest.raises(IntegrityError, match=r"does not compute what the teacher computes"):
        compare(top(one), top(other), bound=1.0)


@pytest.mark.parametrize("field", ["logp_BTK", "tail_BT", "lp_next_BT"])
@pytest.mark.parametrize("wrong", [float("nan"), -0.001])
def test_one_wrong_number_is_refused(field, wrong):
    """A single entry, tail or next log-prob that is off, or NaN, fails the proof."""
    exact = top(torch.randn(ROWS * LENGTH, VOCAB))
    array = getattr(exact, field).copy()
    array[1, 3] = wrong
    with pytest.raises(IntegrityError):
        compare(replace(exact, **{field: array}), exact, bound=0.01)


def test_the_same_teacher_passes_and_another_does_not(toy, tmp_path):
    """An engine is itself to the last bit; another teacher's weights are too far."""
    options = EngineOptions(K, VOCAB)
    reference = open_reference(toy, options)
    assert prove(reference, reference, TOKENS, STARTS, 0.0)["max_delta_logprob"] == 0
    other = open_reference(save_toy(tmp_path, rope_theta=10.0), options)
    with pytest.raises(IntegrityError, match="use `engine: transformers`"):
        prove(other, reference, TOKENS, STARTS, 0.01)


def expected_in(precision, toy, tmp_path, bound=None):
    proof = Proof(TOKENS, STARTS, bound, tmp_path / "parity.json")
    options = EngineOptions(K, VOCAB, precision=precision)
    return proof, options, proof.expect(toy, options, lambda: create_engine("transformers"))


def test_in_bfloat16_the_references_own_rounding_is_the_measure(toy, tmp_path):
    """The reference in bfloat16 passes; the same with one unlikely mistake everywhere does not, by its mean."""
    proof, options, expected = expected_in("bfloat16", toy, tmp_path)
    assert 0 < expected.mean_bound < expected.bound < 1
    rounded = open_reference(toy, replace(options, finer_products=False))
    proof.settle(rounded, expected)
    figures = json.loads(proof.record.read_text())
    assert figures["max_delta_logprob"] == pytest.approx(expected.bound / 3)
    assert figures["mean_bound"] == expected.mean_bound
    found = rounded.score(TOKENS, STARTS)
    off = replace(found, logp_BTK=found.logp_BTK - np.float32(3 * expected.mean_bound))
    assert 4 * expected.mean_bound < expected.bound
    with pytest.raises(IntegrityError, match="on average"):
        compare(off, expected.top_k, expected.bound, expected.mean_bound)


def test_the_measure_is_rounding_to_bfloat16_on_every_cpu(toy, tmp_path, monkeypatch):
    """A teacher that is scored in float32, where the CPU has no bfloat16, makes no other engine's bound tighter."""
    bounds = []
    for has_bfloat16 in (True, False):
        monkeypatch.setattr("lmdistill.precision._cpu_has_bfloat16", lambda has=has_bfloat16: has)
        expected = expected_in("bfloat16", toy, tmp_path)[2]
        bounds.append((expected.bound, expected.mean_bound))
    assert bounds[0] == bounds[1]


def test_a_bound_of_ones_own_counts_alone(toy, tmp_path):
    """The recipe's bound replaces what the precision explains."""
    _, _, expected = expected_in("bfloat16", toy, tmp_path, bound=0.7)
    assert (expected.bound, expected.mean_bound) == (0.7, math.inf)
    assert expected_in("float32", toy, tmp_path)[2].bound == FLOAT32_BOUND
