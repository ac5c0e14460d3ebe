"""`cache convert`: between variants nothing changes, fewer entries are exact, a kill loses one shard at most."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signals_synthetic import BigramEngine, capture, random_rows, write_cache, write_corpus

from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.signals.exchange import convert as convert_module
from lmdistill.signals.exchange.convert import convert
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.writer import ShardWriter


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    teacher = BigramEngine()
    write_corpus(folder / "corpus", {"train": teacher.text(1, 10), "valid": teacher.text(2, 5)})
    for name in ("mmap", "compact"):
        capture(folder / "corpus", folder / name, BigramEngine(), ("train", "valid"), name).run()
    return folder


@pytest.mark.parametrize(("start", "other"), [("mmap", "compact"), ("compact", "mmap")])
def test_there_and_back_gives_the_same_bytes_and_there_those_of_a_capture(captured, tmp_path, start, other):
    """Shards, records and manifest: a converted cache cannot be told from one that was captured so."""
    convert(captured / start, tmp_path / "there", other)
    assert contents(tmp_path / "there") == contents(captured / other)
    convert(tmp_path / "there", tmp_path / "back", start)
    assert contents(tmp_path / "back") == contents(captured / start)


@pytest.mark.parametrize(
    ("vocab", "keys"), [(70_000, {}), (300, {"top_p": 0.9, "k_min": 2}), (70_000, {"top_p": 0.8, "k_min": 1})]
)
def test_wide_ids_and_varying_entries_come_back_too(tmp_path, vocab, keys):
    write_cache(tmp_path / "mmap", *random_rows(5, 6, 8, vocab, 6), vocab, **keys)
    convert(tmp_path / "mmap", tmp_path / "compact", "compact")
    convert(tmp_path / "compact", tmp_path / "back", "mmap")
    for shard in tmp_path.glob("mmap/*.sig"):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 7),
    scale=st.floats(0.1, 8.0),
    keys=st.sampled_from([{}, {"top_p": 0.9, "k_min": 2}]),
)
def test_fewer_entries_are_the_first_ones_and_the_rest_of_one_is_the_tails(tmp_path_factory, seed, k, scale, keys):
    """What stays is the same to the last bit, head + tail = 1 to f16, and the alignment proof still holds."""
    folder = tmp_path_factory.mktemp("cut")
    write_cache(folder / "whole", *random_rows(seed, 5, 12, 40, 8, scale), 40, **keys)
    manifest = convert(folder / "whole", folder / "cut", k=k)
    whole, cut = (SignalsReader(folder / name).read(slice(None)) for name in ("whole", "cut"))
    assert (cut.logp_RTK == whole.logp_RTK[..., :k]).all()
    assert (cut.ids_RTK == whole.ids_RTK[..., :k]).all()
    assert np.array_equal(cut.lp_next_RT, whole.lp_next_RT, equal_nan=True)
    rest = np.exp(whole.tail_RT.astype("f8")) + np.exp(whole.logp_RTK[..., k:].astype("f8")).sum(-1)
    assert np.allclose(np.exp(cut.tail_RT.astype("f8")), rest, rtol=0.02, atol=2e-3)
    total = np.exp(cut.tail_RT.astype("f8")) + np.exp(cut.logp_RTK.astype("f8")).sum(-1)
    assert abs(total - 1).max() <= 1e-3
    assert manifest.splits["train"].statistics["head_mass"] == pytest.approx(
        np.exp(cut.logp_RTK.astype("f8")).sum(-1).mean(), abs=1e-4
    )
    assert (manifest.layout.k, manifest.layout.cut_from) == (k, 8)
    assert not verify(folder / "cut")


def test_a_second_cut_is_proven_by_the_first_code(captured, tmp_path):
    """However often entries are dropped, the codes are those of the K at which they were made."""
    convert(captured / "mmap", tmp_path / "six", k=6)
    assert convert(tmp_path / "six", tmp_path / "three", "compact", 3).layout.cut_from == 8
    convert(captured / "mmap", tmp_path / "straight", "compact", 3)
    ours, theirs = (SignalsReader(tmp_path / name).read(slice(None)) for name in ("three", "straight"))
    assert (ours.logp_RTK == theirs.logp_RTK).all()
    assert np.allclose(ours.tail_RT, theirs.tail_RT, atol=0.01)


def test_a_stopped_conversion_is_no_cache_and_goes_on_with_the_next_shard(captured, tmp_path, monkeypatch):
    out = tmp_path / "out"
    commit, written = ShardWriter.commit, []

    def stopped(writer: ShardWriter):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(writer.job)
        return commit(writer)

    monkeypatch.setattr(ShardWriter, "commit", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(captured / "mmap", out, "compact")
    assert not out.exists()
    with pytest.raises(IntegrityError, match="no teacher cache"):
        SignalsReader(tmp_path / ".out.partial")
    monkeypatch.setattr(ShardWriter, "commit", lambda writer: written.append(writer.job) or commit(writer))
    with pytest.raises(PreflightError, match=r"an unfinished cache of another command(.|\n)*differs in k"):
        convert(captured / "mmap", out, "compact", 4)
    convert(captured / "mmap", out, "compact")
    assert len(written) == len(set(written)) == 5
    assert contents(out) == contents(captured / "compact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_shard_that_was_damaged_in_between_is_made_again(captured, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(captured / "mmap", tmp_path / "out", "compact")
    monkeypatch.undo()
    shard = tmp_path / ".out.partial" / "cache" / "train-00001.sig"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    convert(captured / "mmap", tmp_path / "out", "compact")
    assert (tmp_path / "out" / "train-00001.sig").read_bytes() == (captured / "compact/train-00001.sig").read_bytes()


def test_what_cannot_be_converted_is_refused_before_anything_is_written(captured, tmp_path):
    with pytest.raises(PreflightError, match=r"--k 9: the cache has 8 entries(.|\n)*give 1 to 8"):
        convert(captured / "mmap", tmp_path / "out", k=9)
    with pytest.raises(PreflightError, match=r"no variant 'compct'; did you mean 'compact'"):
        convert(captured / "mmap", tmp_path / "out", "compct")
    with pytest.raises(PreflightError, match="is there already"):
        convert(captured / "mmap", captured / "compact", "compact")
    with pytest.raises(IntegrityError, match="no teacher cache"):
        convert(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_source_is_named_and_makes_no_cache(captured, tmp_path):
    shutil.copytree(captured / "mmap", tmp_path / "bad")
    shard = tmp_path / "bad" / "valid-00001.sig"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shard valid-00001.sig of .* is damaged(.|\n)*crc32 differs"):
        convert(tmp_path / "bad", tmp_path / "out", "compact")
    assert not (tmp_path / "out").exists()


def test_a_variant_that_reads_otherwise_than_it_writes_is_found(captured, tmp_path, monkeypatch):
    """The new cache is read and held against the old one row by row, not only against its own digests."""
    original = convert_module.Cache.chunks

    def wrong(cache, shard):
        for chunk in original(cache, shard):
            if cache.layout.variant == "compact":
                chunk.raw_R["top1"][0, 0] = -1.5
            yield replace(chunk)

    monkeypatch.setattr(convert_module.Cache, "chunks", wrong)
    with pytest.raises(IntegrityError, match=r"shard train-00000.sig does not read as it was written"):
        convert(captured / "mmap", tmp_path / "out", "compact")
    assert not (tmp_path / "out").exists()
