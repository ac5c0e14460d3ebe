"""Reading a cache: random access, wide vocabularies, and refusal of what is not what was written."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_synthetic import VOCAB, random_rows, write_cache

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.signals import variant as variants
from lmdistill.signals.format import Layout
from lmdistill.signals.inspect import describe, verify
from lmdistill.signals.reader import SignalsReader


@pytest.mark.parametrize(
    ("vocab", "k"), [(VOCAB, 8), (VOCAB, 1), (VOCAB, VOCAB), (70_000, 16), (65_536, 4), (65_537, 4)]
)
def test_round_trip(tmp_path, variant, vocab, k):
    """Tokens, flags and ids come back exactly, log-probs within the code, for u16 ids and for u16 + high plane."""
    tokens, flags, exact = random_rows(5, 6, 8, vocab, k)
    write_cache(tmp_path, tokens, flags, exact, vocab, variant=variant)
    reader = SignalsReader(tmp_path)
    batch = reader.read(slice(None))
    assert (reader.rows, reader.row_tokens, reader.k, reader.vocab_size) == (6, 8, k, vocab)
    assert (batch.tokens_RT == tokens).all()
    assert (batch.flags_RT == flags).all()
    assert (batch.ids_RTK == exact.ids_BTK).all()
    np.testing.assert_allclose(np.exp(batch.logp_RTK), np.exp(exact.logp_BTK), atol=5e-3)
    np.testing.assert_allclose(batch.tail_RT, exact.tail_BT, atol=0.02)
    np.testing.assert_allclose(batch.lp_next_RT, exact.lp_next_BT, rtol=1e-3)
    assert [a.dtype for a in (batch.tokens_RT, batch.ids_RTK, batch.logp_RTK)] == [np.int32, np.int32, np.float32]


def test_stride():
    """A token takes 104 bytes at K = 32 up to a vocabulary of 65,536, and K + 1 more above."""
    bound = variants.get("mmap").bytes_bound
    assert bound(Layout(256, 32, 65_536)) == 104
    assert bound(Layout(256, 32, 65_537)) == 104 + 33


@pytest.fixture(scope="module")
def cache(tmp_path_factory, variant):
    out = tmp_path_factory.mktemp("cache")
    write_cache(out, *random_rows(7, 11, 16, VOCAB, 8), vocab=VOCAB, variant=variant)
    return SignalsReader(out)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, 10), max_size=20))
def test_any_rows_in_any_order(cache, rows):
    """Reading rows is the same as picking them from the whole: across shards, repeated, none at all."""
    whole, batch = cache.read(slice(None)), cache.read(rows)
    for name, array in vars(batch).items():
        if array is not None:
            np.testing.assert_array_equal(array, getattr(whole, name)[np.asarray(rows, int)])


def test_rows_outside(cache):
    """A row that is not there is an error, not a wrapped index."""
    for rows in ([11], [-1]):
        with pytest.raises(LmdistillError, match="11 rows"):
            cache.read(rows)


def test_reader_travels_to_workers(cache):
    """A data loader's worker gets a reader that opens its own maps."""
    again = pickle.loads(pickle.dumps(cache))
    assert (again.read([3]).ids_RTK == cache.read([3]).ids_RTK).all()


@pytest.fixture
def folder(tmp_path, variant):
    write_cache(tmp_path / "out", *random_rows(9, 8, 16, VOCAB, 8), vocab=VOCAB, variant=variant)
    return tmp_path / "out"


def test_artefact_or_its_out(folder):
    """Both the artefact's folder and its out/ are taken."""
    assert SignalsReader(folder.parent).digest == SignalsReader(folder).digest
    assert describe(folder.parent)["k"] == 8
    assert verify(folder.parent) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "format 2"),
        (lambda m: m["layout"].update(variant="other"), "variant 'other'"),
        (lambda m: m["layout"].update(k=9), "digest"),
        (lambda m: m.pop("teacher"), "missing"),
    ],
)
def test_manifest_is_refused(folder, change, message):
    """Another version, another variant, any changed field: refused before a byte of a shard is read."""
    path = folder / "signals.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    with pytest.raises(IntegrityError, match=message):
        SignalsReader(folder)


def test_missing_split_and_shards(folder):
    """Another split, a cut shard, no shard, no cache: each is one message."""
    with pytest.raises(IntegrityError, match="no split 'valid'"):
        SignalsReader(folder, "valid")
    shard = folder / "train-00001.sig"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"train-00001\.sig has \d+ bytes"):
        SignalsReader(folder)
    shard.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        SignalsReader(folder)
    with pytest.raises(IntegrityError, match="no teacher cache"):
        SignalsReader(folder.parent / "nothing")


def test_every_flipped_byte_is_found_and_located(folder):
    """200 flips at random places of all files: verify names the file, and for shards a byte range holding the flip."""
    rng = np.random.default_rng(0)
    files = sorted(folder.iterdir())
    sizes = np.array([file.stat().st_size for file in files])
    for _ in range(200):
        file = files[rng.choice(len(files), p=sizes / sizes.sum())]
        data = bytearray(file.read_bytes())
        place = int(rng.integers(len(data)))
        before, data[place] = data[place], data[place] ^ int(rng.integers(1, 256))
        file.write_bytes(data)
        located(folder, file.name, place)
        data[place] = before
        file.write_bytes(data)
    assert verify(folder) == []


def located(folder, name, place):
    if name == "signals.json":
        with pytest.raises(IntegrityError, match=r"signals\.json is damaged|format|variant"):
            verify(folder)
        return
    [problem] = verify(folder)
    assert problem.startswith(f"{name}: ")
    first, last = problem.split("bytes ")[1].split(":")[0].split("–")
    assert int(first) <= place <= int(last)
    with pytest.raises(IntegrityError, match=name):
        SignalsReader(folder).read(slice(None))
