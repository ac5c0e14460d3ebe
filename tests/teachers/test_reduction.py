"""Top-K and tail from logits: exact, whatever the vocabulary's size, the ties and the teacher's certainty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.teachers.reduction import reduce_logits, top_k


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([5, 64, 1000, 4096, 5003, 20_000]),
    k=st.sampled_from([1, 4, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equal_to_a_plain_softmax(seed, vocab, k, dtype):
    """Entries, tail and next log-prob equal float64 log-softmax; the group search finds the same values as topk."""
    k = min(k, vocab)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(40, vocab, generator=generator) * 4).to(dtype)
    following = torch.randint(0, vocab, (40,), generator=generator)
    ids, logp, tail, lp_next = reduce_logits(logits, following, k)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), exact.topk(k).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.gather(1, ids.long()), logp.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(lp_next.double(), exact.gather(1, following[:, None])[:, 0], atol=1e-5, rtol=0)
    rest = exact.scatter(1, ids.long(), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(tail.double(), rest, atol=1e-4, rtol=0)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_equals_come_lower_id_first():
    """Among equal logits within the K the order is by id, however the search met them."""
    logits = torch.zeros(3, 20_000)
    logits[:, [7, 300, 19_999, 64, 12_000]] = 2.0
    logits[:, 15_000] = 3.0
    values, ids = top_k(logits, 6)
    assert ids.tolist() == [[15_000, 7, 64, 300, 12_000, 19_999]] * 3
    assert values.tolist() == [[3.0, 2.0, 2.0, 2.0, 2.0, 2.0]] * 3


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_a_certain_teacher_keeps_its_tail(gap):
    """P → 1: the tail is summed itself; log(1 − P) in float32 would be −inf or noise."""
    logits = torch.zeros(1, 1000)
    logits[0, :2] = gap
    _, logp, tail, _ = reduce_logits(logits, torch.tensor([0]), 2)
    assert tail.item() == pytest.approx(torch.log(torch.tensor(998 / 2)).item() - gap, abs=1e-4)
    assert logp[0, 0].item() == pytest.approx(-0.693147, abs=1e-5)


def test_k_is_the_vocabulary():
    """Nothing is left: the tail is −inf, the head sums to one."""
    _, logp, tail, _ = reduce_logits(torch.randn(4, 30), torch.zeros(4, dtype=torch.long), 30)
    assert torch.isneginf(tail).all()
    torch.testing.assert_close(logp.logsumexp(-1), torch.zeros(4), atol=1e-6, rtol=0)
