"""The proof that log-probs belong to their tokens: silent on what belongs together, loud on what does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_synthetic import VOCAB, BigramEngine, plain_flags, random_rows, write_cache

from lmdistill.errors import IntegrityError
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.teachers.engine import TopK


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 8, 60]), st.floats(0.05, 25.0))
def test_what_belongs_together_never_fails(tmp_path_factory, variant, seed, k, scale):
    """The bound is derived, not tuned: for any teacher and K the proof accepts its own rows."""
    out = tmp_path_factory.mktemp("aligned")
    tokens, flags, exact = random_rows(seed, 4, 32, 60, k, scale)
    write_cache(out, tokens, flags, exact, vocab=60, variant=variant)
    SignalsReader(out).read(slice(None))


def shifted(tokens, exact, rng):
    """Predictions one position late: position t holds what belongs to t−1."""
    columns = (exact.ids_BTK, exact.logp_BTK, exact.tail_BT)
    lp_next = np.roll(exact.lp_next_BT, 1, axis=1)
    lp_next[:, 0], lp_next[:, -1] = exact.lp_next_BT[:, 0], np.nan
    return tokens, TopK(*(np.roll(column, 1, axis=1) for column in columns), lp_next)


def early(tokens, exact, rng):
    """Tokens one position early, as when labels are shifted twice."""
    return np.roll(tokens, -1, axis=1), exact


def other_tokenizer(tokens, exact, rng):
    """The same text under other ids."""
    return rng.permutation(VOCAB)[tokens].astype(np.int32), exact


def other_shard(tokens, exact, rng):
    """Predictions of other rows of the same corpus."""
    return np.roll(tokens, 1, axis=0), exact


@pytest.mark.parametrize("wrong", [shifted, early, other_tokenizer, other_shard])
@pytest.mark.parametrize("seed", range(4))
def test_what_does_not_is_caught_in_the_first_batch(tmp_path, variant, wrong, seed):
    """A cache whose checksums are all right, but whose log-probs belong to other tokens, is refused on one row."""
    teacher = BigramEngine(seed)
    tokens = teacher.text(seed, rows=6, length=64)
    exact = teacher.score(tokens, tokens > VOCAB)
    tokens, exact = wrong(tokens, exact, np.random.default_rng(seed))
    write_cache(tmp_path, tokens, plain_flags(*tokens.shape), exact, VOCAB, variant=variant)
    with pytest.raises(IntegrityError, match=r"train-00000\.sig, row 0 .*do not belong to its tokens"):
        SignalsReader(tmp_path).read([0])
    assert any("do not belong" in problem for problem in verify(tmp_path))


def test_a_missing_last_prediction_is_caught(tmp_path, variant):
    """lp_next is NaN at a row's last position and nowhere else: a row cut from a longer one shows."""
    tokens, flags, exact = random_rows(3, 4, 16, VOCAB, 8)
    exact.lp_next_BT[2, -1] = -1.0
    write_cache(tmp_path, tokens, flags, exact, VOCAB, variant=variant)
    reader = SignalsReader(tmp_path)
    reader.read([0, 1, 3])
    with pytest.raises(IntegrityError, match="row 2"):
        reader.read([0, 2])
