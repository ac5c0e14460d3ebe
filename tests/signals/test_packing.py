"""The compact variant's bytes: every coded row comes back bit for bit, whatever the teacher said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from signals_synthetic import BigramEngine, plain_flags, random_rows, write_cache

from lmdistill.corpus.format import DOC_START, LOSS, PAD
from lmdistill.errors import IntegrityError
from lmdistill.signals import coded
from lmdistill.signals import variant as variants
from lmdistill.signals.format import Layout
from lmdistill.signals.inspect import describe
from lmdistill.signals.packing import gap_model, id_model
from lmdistill.signals.packing.segment import SegmentDecoder, encode_segment
from lmdistill.signals.packing.streams import unzigzag, zigzag
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.truncation import truncate
from lmdistill.signals.variants import compact


def unpacked(layout, raw_R, block_rows):
    """Coded rows through a segment's bytes and back."""
    tables, *blocks = encode_segment(layout, raw_R, block_rows)
    decoder = SegmentDecoder(layout, tables)
    sizes = [min(block_rows, len(raw_R) - start) for start in range(0, len(raw_R), block_rows)]
    whole = decoder.decode(blocks, sizes)
    alone = [decoder.decode([block], [rows]) for block, rows in zip(blocks, sizes, strict=True)]
    assert whole.tobytes() == np.concatenate(alone).tobytes()
    return whole


SHAPES = [(64, 1, 16), (64, 8, 16), (64, 64, 5), (300, 300, 3), (70_000, 12, 4), (61_500, 3, 1), (65_536, 4, 7)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.floats(0.05, 25), st.integers(1, 7), st.integers(1, 4))
def test_what_a_teacher_says_comes_back_bit_for_bit(seed, shape, scale, rows, block_rows):
    """K = 1, K = V, V above and below 65,536, rows of one token, flags of padding, peaked and flat teachers."""
    vocab, k, length = shape
    tokens, flags, exact = random_rows(seed, rows, length, vocab, k, scale)
    flags ^= np.random.default_rng(seed).choice([0, LOSS, DOC_START, PAD], flags.shape).astype(np.uint8)
    layout = Layout(length, k, vocab, "compact")
    raw_R = coded.code_rows(layout, tokens, flags, exact)
    assert unpacked(layout, raw_R, block_rows).tobytes() == raw_R.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(64, 8, 16), (70_000, 5, 4), (64, 64, 5)]), st.floats(0.05, 1))
def test_a_varying_number_of_entries_comes_back_bit_for_bit(seed, shape, top_p):
    """What was dropped stays dropped, in the same spelling as in mmap."""
    vocab, k, length = shape
    tokens, flags, exact = random_rows(seed, 5, length, vocab, k, 4.0)
    layout = Layout(length, k, vocab, "compact", top_p=top_p, k_min=2)
    raw_R = coded.code_rows(layout, tokens, flags, truncate(exact, layout))
    assert unpacked(layout, raw_R, 2).tobytes() == raw_R.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(64, 5, 6), (70_000, 4, 3)]))
def test_any_coded_rows_come_back_bit_for_bit(data, shape):
    """Even rows no teacher can have said, NaNs with any payload among them: coding cannot hide what is misaligned."""
    vocab, k, length = shape
    layout = Layout(length, k, vocab, "compact")
    dtype = coded.row_dtype(layout)
    rows = data.draw(st.integers(1, 5))
    raw = data.draw(hnp.arrays(np.uint8, (rows, dtype.itemsize), elements=st.integers(0, 255)))
    raw_R = raw.view(dtype)[:, 0]
    for name in ("token", "ids"):
        high = raw_R[f"{name}_high"].astype(np.int64) << 16 if layout.wide else 0
        coded.split(layout, raw_R, name, (raw_R[name] + high) % vocab)
    assert unpacked(layout, raw_R, 2).tobytes() == raw_R.tobytes()


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.uint16, st.integers(0, 50)))
def test_zigzag_undoes_itself_and_keeps_small_differences_small(numbers):
    """For every number; −n and n are at most 2n."""
    assert (unzigzag(zigzag(numbers)) == numbers).all()
    signed = np.abs(numbers.view(np.int16).astype(np.int64))
    assert (zigzag(numbers) <= 2 * signed).all()


def test_both_variants_decode_to_the_very_same_arrays(tmp_path):
    """Ids, log-probs, tail, lp_next, tokens and flags of one teacher."""
    rows = random_rows(3, 9, 32, 500, 20)
    batches = []
    for name in ("mmap", "compact"):
        write_cache(tmp_path / name, *rows, 500, variant=name)
        batches.append(SignalsReader(tmp_path / name).read([8, 0, 3, 3]))
    for name, array in vars(batches[0]).items():
        np.testing.assert_array_equal(array, getattr(batches[1], name), err_msg=name)


def bigram_rows(rows=64, length=64, vocab=512, k=16):
    """Enough of a predictable teacher for tables to pay."""
    teacher = BigramEngine(vocab=vocab, k=k)
    tokens = teacher.text(1, rows, length)
    return tokens, plain_flags(rows, length), teacher.score(tokens, tokens < 0)


def test_a_predictable_teacher_takes_far_fewer_bytes_than_entropy_of_its_ids(tmp_path):
    """Where a class of positions says which candidates come, ids cost less than a frequency table could make them."""
    tokens, flags, exact = bigram_rows()
    write_cache(tmp_path, tokens, flags, exact, 512, shard_rows=64, variant="compact")
    found = describe(tmp_path)["bytes_per_token"]
    counts = np.bincount(exact.ids_BTK.ravel())
    share = counts[counts > 0] / counts.sum()
    assert found < -(share * np.log2(share)).sum() * exact.ids_BTK.shape[-1] / 8 + 16  # 16: all but the ids
    assert found < variants.get("mmap").bytes_bound(Layout(64, 16, 512)) * 0.8


def test_segments_and_shards_decode_alone(tmp_path, monkeypatch):
    """Several segments a shard, the last ones short: any row is read by itself."""
    monkeypatch.setattr(compact, "SEGMENT_BYTES", 40_000)
    monkeypatch.setattr(compact, "BLOCK_TOKENS", 128)
    rows = bigram_rows(rows=30)
    write_cache(tmp_path / "c", *rows, 512, shard_rows=21, variant="compact")
    write_cache(tmp_path / "m", *rows, 512, shard_rows=21)
    expected = SignalsReader(tmp_path / "m").read(slice(None))
    for row in np.random.default_rng(0).permutation(30):
        batch = SignalsReader(tmp_path / "c").read([row])
        assert (batch.ids_RTK[0] == expected.ids_RTK[row]).all()
        assert (batch.logp_RTK[0] == expected.logp_RTK[row]).all()


def test_memory_for_decoded_blocks_is_bounded(tmp_path, monkeypatch):
    """Reading everything keeps no more than the caches' bounds, and what was dropped is decoded again."""
    monkeypatch.setattr(compact, "BLOCK_TOKENS", 64)
    write_cache(tmp_path, *bigram_rows(rows=40), 512, shard_rows=10, variant="compact")
    reader = SignalsReader(tmp_path)
    reader._memory.blocks.most_bytes, reader._memory.tables.most_bytes = 20_000, 300_000
    whole = reader.read(slice(None))
    assert 0 < reader._memory.blocks._bytes <= 20_000
    assert 0 < reader._memory.tables._bytes <= 300_000
    assert (reader.read([0]).ids_RTK[0] == whole.ids_RTK[0]).all()


def test_what_does_not_compress_is_stored_as_it_is(tmp_path, monkeypatch):
    """Noise takes no byte more than in mmap, and reads the same."""
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(compact, "pays", lambda blocks, rows: sum(map(len, blocks)) < rows.nbytes)
        rows = random_rows(1, 4, 8, 64, 4)
        write_cache(tmp_path / "c", *rows, 64, variant="compact")
    write_cache(tmp_path / "m", *rows, 64)
    assert (tmp_path / "c/train-00000.sig").read_bytes() == (tmp_path / "m/train-00000.sig").read_bytes()
    batches = [SignalsReader(tmp_path / name).read([2, 1]) for name in "cm"]
    assert (batches[0].logp_RTK == batches[1].logp_RTK).all()


def test_a_block_under_tables_or_a_witness_not_its_own_is_refused():
    """Even where every checksum was made new: what is derived must be the tokens and lp_next that were captured."""
    layout = Layout(64, 16, 512, "compact")
    ours, theirs = (
        encode_segment(layout, coded.code_rows(layout, *random_rows(seed, 16, 64, 512, 16)), 16) for seed in (1, 2)
    )
    assert SegmentDecoder(layout, ours[0]).decode([ours[1]], [16]).shape == (16,)
    spoiled = ours[1][:4][::-1] + ours[1][4:]
    with pytest.raises(IntegrityError, match="not those that were captured"):
        SegmentDecoder(layout, ours[0]).decode([spoiled], [16])
    with pytest.raises(IntegrityError, match=r"not those that were captured|does not fit its segment's tables"):
        SegmentDecoder(layout, theirs[0]).decode([ours[1]], [16])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 6), st.integers(2, 5000))
def test_the_id_model_is_a_bijection_on_what_it_was_built_from(seed, tokens, k, vocab):
    """Any ids, skewed or flat, few or many: symbols lead back to them, through the tables' bytes."""
    rng = np.random.default_rng(seed)
    ids_NK = (rng.random((tokens, k)) ** 3 * vocab).astype(np.int64)
    model, class_N = id_model.build(ids_NK, ids_NK[:, 0], None, vocab)
    symbols = model.encode(ids_NK, class_N)
    decoder = id_model.IdModel.from_bytes(model.to_bytes()).decoder()
    assert (ids_NK == decoder.decode(symbols.T, decoder.starts_C[class_N]).T).all()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(0, 9))))
def test_the_gap_model_is_a_bijection_on_any_codes(gaps_NK):
    """Ascending or not."""
    model = gap_model.GapModel.from_bytes(gap_model.GapModel.build(gaps_NK, None).to_bytes())
    symbols_KN = np.ascontiguousarray(model.encode(gaps_NK).T).astype(np.uint16)
    assert (gaps_NK == gap_model.decode_gaps(model.table(), symbols_KN).T).all()
