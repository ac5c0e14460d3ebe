"""One flipped byte anywhere in a cache: found, named by file and bytes, and refused by readers."""

from __future__ import annotations

import json
import re

import pytest
from robust.flips import Flipped, flip_many
from signals_synthetic import BigramEngine, capture, write_corpus

from lmdistill.errors import IntegrityError
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader

FLIPS = 100


@pytest.fixture(scope="module")
def cache(tmp_path_factory, variant):
    """Shards of several blocks each, two splits."""
    folder, teacher = tmp_path_factory.mktemp("cache"), BigramEngine()
    write_corpus(folder / "corpus", {"train": teacher.text(1, 11, 2048), "valid": teacher.text(2, 5, 2048)})
    capture(folder / "corpus", folder / "out", teacher, ("train", "valid"), variant).run()
    return folder / "out"


def test_every_flip_is_detected_located_and_refused(cache):
    """Random bytes of random files: shards, records and the manifest all get their share."""
    found = flip_many(cache, FLIPS, seed=1)
    assert found["missed"] == found["unlocated"] == found["read_anyway"] == []
    assert found["detected"] == found["located"] == found["refused_by_reader"] == FLIPS
    assert min(found["flips_by_file"].values()) > 0
    assert verify(cache) == []


def test_a_flip_that_nothing_sees_would_be_told(cache, monkeypatch):
    """The harness can fail: where verification looks away, every flip counts as missed."""
    monkeypatch.setattr("robust.flips.verify", lambda cache: [])
    monkeypatch.setattr("robust.flips._readable", lambda *_: True)
    found = flip_many(cache, 5)
    assert (found["detected"], found["located"], found["refused_by_reader"]) == (0, 0, 0)
    monkeypatch.setattr("robust.flips.verify", lambda cache: ["train-00000.sig: bytes 0–0: elsewhere"])
    assert flip_many(cache, 5)["located"] == 0


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_shards_damage_is_named_by_its_block(cache, place):
    """The byte range that is named holds the byte, and is no more than a block."""
    path = cache / "train-00001.sig"
    size = path.stat().st_size
    offset = {"first": 0, "middle": size // 2, "last": size - 1}[place]
    with Flipped(path, offset, 0x10):
        [problem] = verify(cache)
    first, last = map(int, re.search(r"train-00001\.sig: block \d+ .*bytes (\d+)–(\d+)", problem).groups())
    assert first <= offset <= last < size
    assert last - first + 1 < size


def test_a_number_made_infinite_by_one_byte_is_damage(cache):
    """A digit of the manifest that becomes an `e`: JSON still, but no number that a cache can have."""
    path = cache / "signals.json"
    text = path.read_text()
    found = re.search(r"\d\.\d{2}(\d)\d{4,}", text)
    offset = len(text[: found.start(1)].encode())
    with Flipped(path, offset, ord(found[1]) ^ ord("e")):
        json.loads(path.read_text())
        for call in (verify, SignalsReader):
            with pytest.raises(IntegrityError, match=r"signals\.json is damaged"):
                call(cache)
