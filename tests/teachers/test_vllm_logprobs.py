"""vLLM's log-probs as arrays: from full distributions, laid out as vLLM lays them out, the same top K comes back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.errors import StageError
from lmdistill.teachers.logprobs import from_flat, from_json, top_k
from lmdistill.teachers.reduction import reduce_logits


def laid_out(logits, tokens, k):
    """Flat and JSON log-probs of a prompt of N+1 tokens whose token n+1 is predicted by logits[n], as vLLM has them."""
    logp = logits.float().log_softmax(-1)
    own = logp.gather(1, tokens[:, None])
    rank = (logp >= own).sum(1)
    best = logp.topk(k)
    flat = SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[], ranks=[])
    listing: list[dict[int, dict] | None] = [None]
    for n in range(len(tokens)):
        ids = [int(tokens[n]), *best.indices[n].tolist()]
        values = [float(own[n]), *best.values[n].tolist()]
        ranks = [int(rank[n]), *range(1, k + 1)]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += ids
        flat.logprobs += values
        flat.ranks += ranks
        flat.end_indices.append(len(flat.token_ids))
        listing.append({
            i: {"logprob": v, "rank": r, "decoded_token": None} for i, v, r in zip(ids, values, ranks, strict=True)
        })  # fmt: skip
    return flat, json.loads(json.dumps(listing))


@st.composite
def distributions(draw):
    """Logits with and without ties, from vague to certain; tokens that are likely, unlikely, or drawn at random."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count, vocab = draw(st.integers(1, 12)), draw(st.sampled_from([5, 40, 3000]))
    logits = torch.randn(count, vocab, generator=generator) * draw(st.sampled_from([0.0, 1.0, 4.0, 20.0]))
    if draw(st.booleans()):
        logits = logits.round()
    where = draw(st.sampled_from(["best", "worst", "any"]))
    tokens = torch.randint(0, vocab, (count,), generator=generator)
    if where != "any":
        tokens = logits.argmax(1) if where == "best" else logits.argmin(1)
    return logits, tokens, draw(st.integers(1, min(vocab, 6)))


@settings(max_examples=150, deadline=None)
@given(distributions())
def test_flat_logprobs_equal_the_reduction_of_the_full_logits(made):
    """Whether the token that is there is among the K, outside, or tied with the K-th: K entries, tail and lp_next."""
    logits, tokens, k = made
    flat, _ = laid_out(logits, tokens, k)
    entries = from_flat(flat, k)
    ids, logp, tail = top_k(entries, logits.shape[1])
    _, expected_logp, expected_tail, expected_next = (part.numpy() for part in reduce_logits(logits, tokens, k))
    exact = logits.double().log_softmax(-1).numpy()
    assert ids.dtype == np.int32 and logp.dtype == tail.dtype == np.float32
    assert all(len(set(row)) == k for row in ids.tolist())
    np.testing.assert_allclose(logp, expected_logp, atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(exact, ids.astype(int), 1), logp, atol=2e-5)
    np.testing.assert_allclose(entries.lp_token_N, expected_next, atol=2e-5)
    np.testing.assert_array_equal(entries.token_N, tokens)
    np.testing.assert_allclose(np.exp(tail), np.exp(expected_tail), atol=1e-5)
    tied = logp[:, 1:] == logp[:, :-1]
    assert (ids[:, 1:][tied] > ids[:, :-1][tied]).all()


@settings(max_examples=100, deadline=None)
@given(distributions())
def test_a_servers_json_says_the_same_as_flat_logprobs(made):
    """An id appears once in a mapping: the token that is there is told from the K by its rank."""
    logits, tokens, k = made
    flat, listing = laid_out(logits, tokens, k)
    for name, array in vars(from_flat(flat, k)).items():
        np.testing.assert_array_equal(getattr(from_json(listing, k), name), array)


@pytest.mark.parametrize("gap", [5.0, 15.0, 40.0, 80.0])
@pytest.mark.parametrize("token", [0, 7])
def test_a_certain_teachers_tail_stays_between_what_is_known(gap, token):
    """P → 1: 1 − head is rounding; the tail is never above (V−K)·p_K nor below a token seen outside the K."""
    logits = torch.zeros(1, 1000)
    logits[0, 0], logits[0, 1] = gap, 1.0
    flat, _ = laid_out(logits, torch.tensor([token]), 2)
    _, logp, tail = top_k(from_flat(flat, 2), 1000)
    truth = float(logits.double().log_softmax(-1)[0, 2:].logsumexp(0))
    assert np.isfinite(tail).all()
    assert abs(np.exp(tail[0]) - np.exp(truth)) < 1e-5
    assert tail[0] <= np.log(998) + logp[0, 1] + 1e-5
    assert token == 0 or tail[0] >= logp[0, 1] - 1.001


def test_k_is_the_vocabulary():
    """Nothing is left."""
    flat, _ = laid_out(torch.randn(3, 6), torch.tensor([0, 1, 2]), 6)
    assert np.isneginf(top_k(from_flat(flat, 6), 6)[2]).all()


def test_mass_on_the_vocabularys_padding_is_refused():
    """An id above the tokenizer's among the K: its mass cannot be cut afterwards, so the teacher is refused."""
    logits = torch.zeros(2, 50)
    logits[1, 45] = 3.0
    flat, _ = laid_out(logits, torch.tensor([0, 1]), 4)
    with pytest.raises(StageError, match="such as 45 of 40"):
        top_k(from_flat(flat, 4), 40)


def spoilt(name, change):
    flat, _ = laid_out(torch.randn(3, 9), torch.tensor([1, 2, 3]), 4)
    change(getattr(flat, name))
    return flat


@pytest.mark.parametrize(("name", "change"), [
    ("end_indices", lambda ends: ends.__setitem__(2, ends[2] - 1)),
    ("start_indices", lambda starts: starts.clear()),
    ("logprobs", lambda values: values.pop()),
    ("end_indices", lambda ends: ends.__setitem__(0, 5)),
])  # fmt: skip
def test_another_flat_layout_is_refused(name, change):
    """Fewer entries, no positions, lists of different lengths, an entry at position 0."""
    with pytest.raises(StageError, match="not laid out as expected"):
        from_flat(spoilt(name, change), 4)


@pytest.mark.parametrize("change", [
    lambda listing: listing.pop(0),
    lambda listing: listing.__setitem__(2, None),
    lambda listing: listing[1].popitem(),
    lambda listing: listing[3].clear(),
    lambda listing: next(iter(listing[2].values())).pop("rank"),
    lambda listing: listing[1].update({"token_id:7": {"logprob": 0.0, "rank": 9}}),
    lambda listing: listing.__setitem__(slice(1, None), []),
])  # fmt: skip
def test_another_json_layout_is_refused(change):
    """A position too few, empty or null, an entry without rank, keys that are no ids: said so, never a traceback."""
    _, listing = laid_out(torch.randn(3, 9), torch.tensor([1, 2, 3]), 4)
    change(listing)
    with pytest.raises(StageError, match="not laid out as expected"):
        from_json(listing, 4)
