"""A varying number of entries: top-p with a floor and a cap, in both variants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_synthetic import VOCAB, BigramEngine, plain_flags, random_rows, write_cache

from lmdistill.errors import IntegrityError
from lmdistill.signals.format import Layout
from lmdistill.signals.inspect import describe, verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.truncation import truncate

KEYS = st.fixed_dictionaries({"top_p": st.floats(0.01, 0.999), "k_min": st.integers(1, 8)})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.05, 25), KEYS)
def test_the_fewest_entries_that_hold_the_mass_are_kept_and_nothing_is_lost(seed, scale, keys):
    """Mass of at least top_p unless the cap ends it; one entry fewer would hold less, unless the floor keeps it."""
    exact = random_rows(seed, 3, 8, VOCAB, 12, scale)[2]
    cut = truncate(exact, Layout(8, 12, VOCAB, **keys))
    count = np.isfinite(cut.logp_BTK).sum(-1)
    mass = np.exp(exact.logp_BTK.astype("f8")).cumsum(-1)
    held = np.take_along_axis(mass, count[..., None] - 1, -1)[..., 0]
    before = np.where(count > 1, np.take_along_axis(mass, np.maximum(count[..., None] - 2, 0), -1)[..., 0], 0)
    assert ((count >= keys["k_min"]) & (count <= 12)).all()
    assert ((held >= keys["top_p"]) | (count == 12)).all()
    assert ((before < keys["top_p"]) | (count == keys["k_min"])).all()
    total = np.exp(cut.logp_BTK.astype("f8")).sum(-1) + np.exp(cut.tail_BT.astype("f8"))
    np.testing.assert_allclose(total, 1, atol=1e-5)
    dropped = ~np.isfinite(cut.logp_BTK)
    assert (cut.ids_BTK == np.where(dropped, cut.ids_BTK[..., :1], exact.ids_BTK)).all()


def test_without_top_p_nothing_is_touched():
    """The engine's own arrays go on."""
    exact = random_rows(1, 2, 4, VOCAB, 8)[2]
    assert truncate(exact, Layout(4, 8, VOCAB)) is exact


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.floats(0.05, 25), keys=KEYS)
def test_readers_get_what_was_kept_from_either_variant(tmp_path_factory, seed, scale, keys):
    """The same arrays; dropped entries are −inf under the first id; head + tail = 1; the proof accepts its own rows."""
    folder = tmp_path_factory.mktemp("varying")
    tokens, flags, exact = random_rows(seed, 5, 16, VOCAB, 8, scale)
    batches = []
    for name in ("mmap", "compact"):
        write_cache(folder / name, tokens, flags, exact, VOCAB, variant=name, **keys)
        batches.append(SignalsReader(folder / name).read([4, 0, 2]))
    for name, array in vars(batches[0]).items():
        np.testing.assert_array_equal(array, getattr(batches[1], name), err_msg=name)
    batch, cut = batches[0], truncate(exact, Layout(16, 8, VOCAB, **keys))
    assert (batch.ids_RTK == cut.ids_BTK[[4, 0, 2]]).all()
    assert (np.isfinite(batch.logp_RTK) == np.isfinite(cut.logp_BTK[[4, 0, 2]])).all()
    total = np.exp(batch.logp_RTK.astype("f8")).sum(-1) + np.exp(batch.tail_RT.astype("f8"))
    np.testing.assert_allclose(total, 1, atol=5e-3)


def test_a_shift_is_caught_with_few_entries_too(tmp_path, variant):
    """Tokens one position early fail on the first row."""
    teacher = BigramEngine()
    tokens = teacher.text(0, rows=4, length=64)
    exact = teacher.score(tokens, tokens < 0)
    keys = {"variant": variant, "top_p": 0.8, "k_min": 1}
    write_cache(tmp_path, np.roll(tokens, -1, axis=1), plain_flags(*tokens.shape), exact, VOCAB, **keys)
    with pytest.raises(IntegrityError, match="do not belong to its tokens"):
        SignalsReader(tmp_path).read([0])


def test_fewer_entries_take_fewer_bytes_in_compact_and_the_same_stride_in_mmap(tmp_path):
    """mmap keeps its stride and adds the count; compact stores what is kept."""
    teacher = BigramEngine(vocab=256, k=32)
    tokens = teacher.text(1, 64, 64)
    rows = tokens, plain_flags(64, 64), teacher.score(tokens, tokens < 0)
    size = {}
    for name in ("mmap", "compact"):
        for top_p in (None, 0.7):
            folder = tmp_path / f"{name}{top_p}"
            write_cache(folder, *rows, 256, shard_rows=64, variant=name, top_p=top_p)
            assert verify(folder) == []
            size[name, top_p] = describe(folder)["bytes_per_token"]
    assert size["mmap", 0.7] == size["mmap", None] + 1
    assert size["compact", 0.7] < size["compact", None] * 0.7
