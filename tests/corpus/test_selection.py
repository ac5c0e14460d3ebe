"""Deduplication, the split by group, order, resuming and independence of the number of workers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdistill.corpus import encode as encode_module
from lmdistill.corpus.documents import Documents, first_of_each_text, shuffled, split_by_group
from lmdistill.corpus.encode import KEY_BYTES, key_of
from lmdistill.corpus.format import CorpusReader

Make = Callable[..., CorpusReader]
Write = Callable[..., str]
NAMES = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=2)), min_size=1, max_size=60)


def documents_of(pairs: list[tuple[str, str]]) -> Documents:
    """Documents of one token with these (text, group)."""
    keys = np.dtype(f"V{KEY_BYTES}")
    return Documents(
        ids_N=np.zeros(len(pairs), np.uint32),
        targets_N=np.ones(len(pairs), np.bool_),
        starts_D=np.arange(len(pairs) + 1, dtype=np.int64),
        text_keys_D=np.frombuffer(b"".join(key_of(text) for text, _ in pairs), keys),
        group_keys_D=np.frombuffer(b"".join(key_of(["group", group]) for _, group in pairs), keys),
        success_D=np.full(len(pairs), np.nan, np.float32),
    )


@given(NAMES, st.floats(0, 0.999))
def test_no_group_straddles_train_and_valid(pairs: list[tuple[str, str]], fraction: float) -> None:
    documents = documents_of(pairs)
    everything = np.arange(len(pairs), dtype=np.int64)
    split = split_by_group(documents, everything, fraction)
    groups = {name: {pairs[i][1] for i in chosen} for name, chosen in split.items()}
    assert not groups["train"] & groups["valid"]
    assert sorted([*split["train"], *split["valid"]]) == list(range(len(pairs)))


@given(NAMES, st.floats(0, 0.5), st.floats(0.001, 0.499))
def test_a_test_split_shares_no_group_and_leaves_valid_as_it_was(
    pairs: list[tuple[str, str]], valid: float, test: float
) -> None:
    documents, everything = documents_of(pairs), np.arange(len(pairs), dtype=np.int64)
    split = split_by_group(documents, everything, valid, test)
    groups = [{pairs[i][1] for i in split[name]} for name in ("train", "valid", "test")]
    assert sum(map(len, groups)) == len({group for _, group in pairs})
    assert split["valid"].tolist() == split_by_group(documents, everything, valid)["valid"].tolist()
    assert sorted(np.concatenate([*split.values()])) == list(range(len(pairs)))


@given(NAMES, st.floats(0, 0.999), NAMES)
def test_more_data_moves_no_document_to_the_other_side(
    pairs: list[tuple[str, str]], fraction: float, more: list[tuple[str, str]]
) -> None:
    def held_out(given_pairs: list[tuple[str, str]]) -> set[str]:
        everything = np.arange(len(given_pairs), dtype=np.int64)
        valid = split_by_group(documents_of(given_pairs), everything, fraction)["valid"]
        return {given_pairs[i][1] for i in valid}

    assert held_out(pairs) <= held_out(pairs + more)


@given(NAMES)
def test_the_first_of_equal_texts_stays(pairs: list[tuple[str, str]]) -> None:
    kept = first_of_each_text(documents_of(pairs), np.arange(len(pairs), dtype=np.int64))
    texts = [text for text, _ in pairs]
    assert kept.tolist() == [i for i, text in enumerate(texts) if text not in texts[:i]]


@given(NAMES, st.integers(0, 5))
def test_order_is_a_permutation_that_the_texts_decide(pairs: list[tuple[str, str]], seed: int) -> None:
    pairs = list({text: (text, group) for text, group in pairs}.values())
    order = shuffled(documents_of(pairs), np.arange(len(pairs), dtype=np.int64), seed)
    assert sorted(order) == list(range(len(pairs)))
    again = pairs[::-1]
    reverse = shuffled(documents_of(again), np.arange(len(pairs), dtype=np.int64), seed)
    assert [pairs[i][0] for i in order] == [again[i][0] for i in reverse]


def test_the_share_held_out_is_near_what_is_asked() -> None:
    pairs = [(str(n), str(n)) for n in range(4000)]
    split = split_by_group(documents_of(pairs), np.arange(4000, dtype=np.int64), 0.1)
    assert 330 < len(split["valid"]) < 470


def hashes(reader: CorpusReader) -> dict[str, str]:
    files = (path for path in sorted(reader.folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(reader.folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def numbered(count: int) -> list[dict[str, str]]:
    return [{"text": f"document {n}, quick brown fox {n * n}", "book": str(n // 10)} for n in range(count)]


def test_workers_change_nothing(make: Make, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "RECORDS_PER_WORKER", 20)
    source = {"source": write(numbered(90)), "group": "book"}
    environment, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    one, two = (make(sources=[source], valid_fraction=0.3, workers=workers) for workers in (1, 2))
    assert hashes(one) == hashes(two)
    assert os.environ is environment and os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_seeds_change_the_order_and_not_the_split(make: Make, write: Write) -> None:
    path = write(numbered(60))
    first, second = (make(sources=[path], valid_fraction=0.3, shuffle_seed=seed) for seed in (0, 1))
    assert first.digest("train") != second.digest("train")
    for name in ("train", "valid"):
        assert first.meta.splits[name].documents == second.meta.splits[name].documents


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make: Make, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = write(numbered(60)), write(numbered(80)[60:], "other.jsonl")
    undisturbed = make(sources=[path, other], valid_fraction=0.3)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lmdistill.corpus.build.copy_tokenizer", killed)
        make(sources=[path, other], valid_fraction=0.3, run="again")
    cached = sorted(Path(undisturbed.folder.parents[1] / "again").rglob("encoded.arrow"))
    times = [file.stat().st_mtime_ns for file in cached]
    resumed = make(sources=[path, other], valid_fraction=0.3, run="again")
    assert hashes(resumed) == hashes(undisturbed)
    assert len(cached) == 2 and [file.stat().st_mtime_ns for file in cached] == times, "encoded only once"


def test_duplicates_go_and_can_be_kept(make: Make, write: Write) -> None:
    path = write([{"text": "the same text"}] * 5 + [{"text": "another text"}, {"text": ""}, {"text": None}])
    assert make(sources=[path]).meta.splits["train"].documents == 2
    assert make(sources=[path], deduplicate="none").meta.splits["train"].documents == 6
