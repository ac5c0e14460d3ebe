"""`cache merge`: all rows of several caches in one, refused where they do not belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from signals_synthetic import TEACHER, BigramEngine, capture, plain_flags, write_corpus

from lmdistill.corpus.format import tokens_digest
from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.signals.exchange import merge as merge_module
from lmdistill.signals.exchange.convert import convert
from lmdistill.signals.exchange.merge import merge
from lmdistill.signals.format import Manifest, load_manifest
from lmdistill.signals.hidden import HiddenLayout
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.teachers.engine import TopKWithHidden

HIDDEN = HiddenLayout((0, 1), 3, "float16")


class HiddenEngine(BigramEngine):
    """Its hidden states say which token they are of."""

    def score(self, tokens_BT, starts_BT):
        states = np.broadcast_to(tokens_BT[..., None, None], (*tokens_BT.shape, 2, 3)).astype("f4")
        return TopKWithHidden(**vars(super().score(tokens_BT, starts_BT)), hidden_BTLD=states)


def captured(folder: Path, variant: str, hidden: bool = False, **splits) -> Path:
    """A cache of the given rows."""
    write_corpus(folder / "corpus", splits)
    run = capture(
        folder / "corpus", folder / "cache", (HiddenEngine if hidden else BigramEngine)(), (*splits,), variant
    )
    run.layout = replace(run.layout, hidden=HIDDEN if hidden else None)
    run.run()
    return folder / "cache"


@pytest.fixture(scope="module")
def texts():
    teacher = BigramEngine()
    return {"a": teacher.text(1, 10), "b": teacher.text(2, 7), "c": teacher.text(3, 3)}


@pytest.fixture(scope="module")
def caches(texts, variant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return [
        captured(folder / "a", variant, train=texts["a"], valid=texts["c"]),
        captured(folder / "b", variant, train=texts["b"]),
        captured(folder / "c", variant, train=texts["a"][4:6], extra=texts["b"][:5]),
    ]


def rewritten(cache: Path, out: Path, **changes) -> Path:
    """The same cache with a manifest that says otherwise."""
    out.mkdir()
    for path in cache.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    manifest: Manifest = load_manifest(cache)
    (out / "signals.json").write_text(replace(manifest, **changes).to_json())
    return out


def test_the_rows_of_all_are_there_in_order_and_prove_themselves(caches, texts, tmp_path):
    """Splits by name; a split's corpus digest is that of a corpus with all its rows; any row can be read alone."""
    merged = merge(tmp_path / "out", caches)
    wanted = {"train": np.concatenate([texts["a"], texts["b"], texts["a"][4:6]]), "valid": texts["c"]}
    wanted["extra"] = texts["b"][:5]
    assert not verify(tmp_path / "out")
    for name, tokens in wanted.items():
        reader = SignalsReader(tmp_path / "out", name)
        order = np.random.default_rng(0).permutation(len(tokens))
        assert (reader.read(order).tokens_RT == tokens[order]).all()
        flags = plain_flags(*tokens.shape)
        assert merged.manifest.splits[name].corpus_digest == tokens_digest(tokens, flags)
    ours = SignalsReader(tmp_path / "out").read(range(10, 17))
    theirs = SignalsReader(caches[1]).read(slice(None))
    assert (ours.logp_RTK == theirs.logp_RTK).all()
    assert (merged.duplicates, merged.leaked, merged.dropped) == (2, 0, 0)


def test_statistics_are_those_of_all_rows(caches, tmp_path):
    figures = merge(tmp_path / "out", caches[:2]).manifest.splits["train"].statistics
    parts = [load_manifest(cache).splits["train"].statistics for cache in caches[:2]]
    for name in ("head_mass", "teacher_nll", "kl_mean"):
        mean = np.average([part[name] for part in parts], weights=[part["tokens"] for part in parts])
        assert figures[name] == pytest.approx(mean)
    assert figures["tokens"] == sum(part["tokens"] for part in parts)


def test_shards_are_taken_as_they_are(caches, tmp_path):
    """Nothing is decoded: bytes and digests of shards are those of the inputs, whatever their lengths."""
    entries = merge(tmp_path / "out", caches).manifest.splits["train"].shards
    sources = [shard for cache in caches for shard in load_manifest(cache).splits["train"].shards]
    assert [entry.sha256 for entry in entries] == [shard.sha256 for shard in sources]
    assert [entry.rows for entry in entries] == [4, 4, 2, 4, 3, 2]
    assert [entry.first_row for entry in entries] == [0, 4, 8, 10, 14, 17]


def test_deduplicated_each_row_is_there_once_and_held_out_rows_stay_held_out(caches, texts, variant, tmp_path):
    leaky = captured(tmp_path / "leaky", variant, train=np.concatenate([texts["c"], texts["b"], texts["b"][:1]]))
    plain = merge(tmp_path / "plain", [*caches, leaky])
    assert (plain.duplicates, plain.leaked, plain.dropped) == (2 + 7 + 1, 3, 0)
    merged = merge(tmp_path / "out", [*caches, leaky], deduplicate=True)
    assert merged.dropped == 13
    tokens = SignalsReader(tmp_path / "out").read(slice(None)).tokens_RT
    assert (tokens == np.concatenate([texts["a"], texts["b"]])).all()
    assert (SignalsReader(tmp_path / "out", "valid").read(slice(None)).tokens_RT == texts["c"]).all()
    split = merged.manifest.splits["train"]
    assert split.corpus_digest == tokens_digest(tokens, plain_flags(*tokens.shape))
    assert split.statistics["tokens"] == tokens.size
    assert split.statistics["targets"] == tokens.size - len(tokens)
    assert not verify(tmp_path / "out")


def test_part_of_a_shard_can_go(caches, texts, variant, tmp_path):
    """A shard that loses a row is written anew; the others are not."""
    first = captured(tmp_path / "first", variant, train=texts["a"][5:6])
    merged = merge(tmp_path / "out", [first, caches[0]], deduplicate=True)
    tokens = SignalsReader(tmp_path / "out").read(slice(None)).tokens_RT
    assert (tokens == np.concatenate([texts["a"][5:6], texts["a"][:5], texts["a"][6:]])).all()
    assert [shard.rows for shard in merged.manifest.splits["train"].shards] == [1, 4, 3, 2]


def test_hidden_states_come_along(texts, variant, tmp_path):
    """Taken or written anew, converted or merged: a token's hidden states stay with it."""
    first = captured(tmp_path / "first", variant, hidden=True, train=texts["a"][5:6])
    second = captured(tmp_path / "second", variant, hidden=True, train=texts["a"])
    merge(tmp_path / "out", [first, second], deduplicate=True)
    convert(tmp_path / "out", tmp_path / "fewer", k=2)
    for folder in ("out", "fewer"):
        reader = SignalsReader(tmp_path / folder)
        tokens = reader.read(slice(None)).tokens_RT
        assert (reader.hidden(slice(None)) == tokens[..., None, None]).all()
        assert not verify(tmp_path / folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": replace(TEACHER, digest="1" * 64)}, "the teacher's digest"),
        ({"teacher": replace(TEACHER, precision="bfloat16")}, "the teacher's precision"),
        ({"teacher": replace(TEACHER, engine_version="2")}, "the teacher's engine_version"),
        ({"tokenizer_digest": "u" * 64}, "the tokenizer's digest"),
        ({"chat_template_digest": "c" * 64}, "the chat template's digest"),
        ({"packing": "isolate"}, "packing"),
    ],
)
def test_caches_that_differ_are_refused_with_the_field_named(caches, tmp_path, changes, field):
    other = rewritten(caches[1], tmp_path / "other", **changes)
    with pytest.raises(PreflightError, match=f"differ in {field}"):
        merge(tmp_path / "out", [caches[0], other])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("k", 4), ("row_tokens", 8), ("vocab_size", 65)])
def test_other_layouts_are_refused_with_the_field_named(caches, tmp_path, field, value):
    layout = replace(load_manifest(caches[1]).layout, **{field: value})
    other = rewritten(caches[1], tmp_path / "other", layout=layout)
    with pytest.raises(PreflightError, match=rf"differ in layout.{field}(.|\n)*cache convert"):
        merge(tmp_path / "out", [caches[0], other])


def test_where_the_teacher_lay_does_not_matter(caches, tmp_path):
    other = rewritten(caches[1], tmp_path / "other", teacher=replace(TEACHER, source="/elsewhere"))
    assert merge(tmp_path / "out", [caches[0], other]).manifest.teacher == TEACHER


def test_a_stopped_merge_is_no_cache_and_goes_on(caches, tmp_path, monkeypatch):
    take, taken = merge_module.take, []

    def stopped(source: Path, target: Path) -> None:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(target.name)
        take(source, target)

    monkeypatch.setattr(merge_module, "take", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", caches)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merge_module, "take", lambda *pair: taken.append(pair[1].name) or take(*pair))
    merge(tmp_path / "out", caches)
    assert len(taken) == len(set(taken)) == 6 + 1 + 2
    merge(tmp_path / "again", caches)
    for path in (tmp_path / "again").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_input_is_named(caches, tmp_path):
    bad = rewritten(caches[1], tmp_path / "bad")
    data = bytearray((bad / "train-00000.sig").read_bytes())
    data[-1] ^= 4
    (bad / "train-00000.sig").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shard train-00000.sig of .*bad is damaged"):
        merge(tmp_path / "out", [caches[0], bad])


def test_one_cache_is_none_to_merge(caches, tmp_path):
    with pytest.raises(PreflightError, match="two caches or more"):
        merge(tmp_path / "out", caches[:1])
