"""`cache merge` and `cache convert` carry hidden states to the last bit, or refuse by name what they cannot carry."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from signals_synthetic import BigramEngine, capture, write_corpus

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.signals.exchange import rows as rows_module
from lmdistill.signals.exchange.as_corpus import open_cache, take_cache
from lmdistill.signals.exchange.convert import convert
from lmdistill.signals.exchange.merge import merge
from lmdistill.signals.hidden import HiddenLayout
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.cached_signals import CachedSignalsConfig, CachedSignalsStage
from lmdistill.teachers.engine import TopKWithHidden

LAYERS, WIDTH = (0, 3), 40


class NoisyEngine(BigramEngine):
    """Its hidden states are noise that only the tokens of the row determine: no two rows have the same."""

    def score(self, tokens_BT, starts_BT):
        seeds = [np.random.default_rng(tokens.astype(np.int64)) for tokens in tokens_BT]
        hidden = np.stack([rng.normal(0, 30, (tokens_BT.shape[1], len(LAYERS), WIDTH)) for rng in seeds])
        return TopKWithHidden(**vars(super().score(tokens_BT, starts_BT)), hidden_BTLD=hidden.astype(np.float32))


def captured(folder: Path, dtype: str | None, variant: str = "mmap", **splits) -> Path:
    """A cache of the given rows; without hidden states where `dtype` is None."""
    write_corpus(folder / "corpus", splits)
    run = capture(folder / "corpus", folder / "cache", (NoisyEngine if dtype else BigramEngine)(), (*splits,), variant)
    run.layout = replace(run.layout, hidden=HiddenLayout(LAYERS, WIDTH, dtype) if dtype else None)
    run.run()
    return folder / "cache"


def hidden_bytes(folder: Path, split: str = "train") -> bytes:
    """All stored hidden states of a split, in order."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob(f"{split}-*.hid")))


@pytest.fixture(scope="module", params=["float16", "int8"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def texts():
    teacher = BigramEngine()
    return {"a": teacher.text(1, 10), "b": teacher.text(2, 7), "c": teacher.text(3, 3)}


@pytest.fixture(scope="module")
def caches(texts, dtype, variant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    first = captured(folder / "a", dtype, variant, train=texts["a"], valid=texts["c"])
    return first, captured(folder / "b", dtype, variant, train=texts["b"])


def test_a_converted_cache_has_the_bytes_of_one_captured_so(caches, texts, dtype, variant, tmp_path):
    """Every file, with hidden states and their checksums in the records; and there and back again."""
    other = "compact" if variant == "mmap" else "mmap"
    convert(caches[0], tmp_path / "there", other)
    straight = captured(tmp_path / "straight", dtype, other, train=texts["a"], valid=texts["c"])
    convert(tmp_path / "there", tmp_path / "back", variant)
    for found, wanted in (("there", straight), ("back", caches[0])):
        names = sorted(path.name for path in wanted.iterdir())
        assert sorted(path.name for path in (tmp_path / found).iterdir()) == names
        assert any(name.endswith(".hid") for name in names)
        for name in names:
            assert (tmp_path / found / name).read_bytes() == (wanted / name).read_bytes(), name


def test_fewer_entries_leave_hidden_states_as_they_are(caches, tmp_path):
    convert(caches[0], tmp_path / "out", k=3)
    for split in ("train", "valid"):
        assert hidden_bytes(tmp_path / "out", split) == hidden_bytes(caches[0], split)
    assert not verify(tmp_path / "out")


def test_in_pieces_smaller_than_a_shard_they_are_the_same(caches, variant, tmp_path, monkeypatch):
    """However few rows are held at once, hidden states counted."""
    other = "compact" if variant == "mmap" else "mmap"
    convert(caches[0], tmp_path / "whole", other)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 1)
    convert(caches[0], tmp_path / "rows", other)
    assert hidden_bytes(tmp_path / "rows") == hidden_bytes(caches[0])
    assert SignalsReader(tmp_path / "rows").digest == SignalsReader(tmp_path / "whole").digest


def test_merged_shards_keep_their_bytes_and_rows_their_states(caches, tmp_path):
    """In order, under new names; a row reads as it did in its own cache."""
    merge(tmp_path / "out", caches)
    assert hidden_bytes(tmp_path / "out") == hidden_bytes(caches[0]) + hidden_bytes(caches[1])
    assert hidden_bytes(tmp_path / "out", "valid") == hidden_bytes(caches[0], "valid")
    merged = SignalsReader(tmp_path / "out").hidden([12, 3, 16])
    first, second = (SignalsReader(cache) for cache in caches)
    assert (merged == np.concatenate([second.hidden([2]), first.hidden([3]), second.hidden([6])])).all()
    assert not verify(tmp_path / "out")


def test_rows_that_stay_of_a_shard_written_anew_keep_their_bytes(caches, texts, dtype, variant, tmp_path):
    """Deduplicated: of a shard that loses rows, those that stay have the very bytes they had."""
    early = captured(tmp_path / "early", dtype, variant, train=texts["a"][[1, 6]])
    merge(tmp_path / "out", [early, caches[0]], deduplicate=True)
    row = len(hidden_bytes(caches[0])) // 10
    whole = hidden_bytes(caches[0])
    stay = b"".join(whole[at * row : (at + 1) * row] for at in range(10) if at not in (1, 6))
    assert hidden_bytes(tmp_path / "out") == hidden_bytes(early) + stay
    assert not verify(tmp_path / "out")


def test_caches_with_other_hidden_states_are_not_one(caches, texts, dtype, variant, tmp_path):
    """None, or another dtype: the field is named, nothing is left behind."""
    for other in (None, "int8" if dtype == "float16" else "float16"):
        cache = captured(tmp_path / str(other), other, variant, train=texts["b"])
        with pytest.raises(PreflightError, match=r"differ in layout.hidden"):
            merge(tmp_path / "out", [caches[0], cache])
        with pytest.raises(PreflightError, match=r"differ in layout.hidden"):
            merge(tmp_path / "out", [cache, caches[0]])
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_hidden_states_make_no_cache(caches, tmp_path, damage):
    """Neither command carries them on: the file is named."""
    bad = tmp_path / "bad"
    shutil.copytree(caches[0], bad)
    file = bad / "train-00001.hid"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if damage == "flipped" else data[:-1])
    if damage == "missing":
        file.unlink()
    with pytest.raises(IntegrityError, match=r"shard train-00001.sig of .*bad is damaged(.|\n)*train-00001\.hid"):
        convert(bad, tmp_path / "converted", k=3)
    with pytest.raises(IntegrityError, match=r"shard train-00001.sig of .*bad is damaged(.|\n)*train-00001\.hid"):
        merge(tmp_path / "merged", [caches[1], bad])
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "merged").exists()


def test_a_recipe_knows_whose_hidden_states_a_cache_holds(caches, texts, variant, tmp_path):
    """As it knows of `teach`, before anything runs; of no cache it says nothing."""
    without = captured(tmp_path / "without", None, variant, train=texts["c"])
    told = [CachedSignalsConfig(cache=str(cache)).hidden_layers for cache in (caches[0], without, tmp_path / "none")]
    assert told == [LAYERS, (), None]


def test_a_run_takes_them_from_a_cache_and_plans_their_room(caches, tmp_path):
    """`cached_signals`: the same files, and a disk estimate that counts every one but records and manifest."""
    take_cache(open_cache(AssetSpec(source=str(caches[0]))), tmp_path)
    assert hidden_bytes(tmp_path) == hidden_bytes(caches[0])
    config = CachedSignalsConfig(cache=str(caches[0]))
    estimate = CachedSignalsStage().estimate(PreflightContext("cached", config, {}, None, tmp_path))
    data = [path for path in caches[0].iterdir() if path.suffix in (".sig", ".hid")]
    assert estimate.disk_bytes == sum(path.stat().st_size for path in data)
