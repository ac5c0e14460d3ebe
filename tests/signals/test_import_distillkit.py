"""`cache import --format distillkit`: what a capture says is what the cache says, and what it cannot say is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_data import LENGTHS, SETTINGS, compress, pack_bits, spoken, write_compressed
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.corpus.format import DOC_START, LOSS, PAD
from lmdistill.signals.exchange.distillkit_codec import Compression, unpack_bits
from lmdistill.signals.exchange.document import TAIL_FLOOR
from lmdistill.signals.exchange.importing import import_cache
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.writer import ShardWriter

POLYNOMIAL = {
    "exact_k": 6,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "normalize_t": True,
}
BINS = [
    {"scale_dtype": "float16", "element_bits": 8, "num_elements": 3},
    {"scale_dtype": "bfloat16", "element_bits": 3, "num_elements": 4},
    {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
]
LAYOUTS = {
    "exact": {},
    "half": {"exact_dtype": "bfloat16"},
    "deltas": {"delta_encoding": True},
    "curve": POLYNOMIAL,
    "residuals": {**POLYNOMIAL, "residual_bins": BINS},
    "residuals alone": {"exact_k": 7, "residual_bins": BINS},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_read_as_their_settings_say(documents, name):
    """Every part of the compressed layout: exact values, curves, residual bins of any bits, deltas."""
    chosen = SETTINGS | LAYOUTS[name]
    logp = documents[2][1].logp_BTK[0]
    stored, wanted = compress(logp, chosen)
    found = Compression.model_validate(chosen)
    assert found.position_bytes == stored.shape[1]
    np.testing.assert_allclose(found.logprobs(stored), wanted, atol=2e-4)


@settings(deadline=None)
@given(bits=st.integers(1, 40), count=st.integers(1, 20), seed=st.integers(0, 1000))
def test_bit_strings_of_any_width_come_back(bits, count, seed):
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (3, count), dtype=np.uint64)
    assert (unpack_bits(pack_bits(numbers, bits), bits, count) == numbers).all()


@pytest.mark.parametrize("whole", [False, True])
def test_the_cache_says_what_the_capture_said(documents, options, tmp_path, whole):
    """Tokens, order, log-probs, the log-prob of the next token; documents stand whole in rows of the longest."""
    write_compressed(tmp_path / "data", documents, {}, whole)
    imported = import_cache(tmp_path / "data", tmp_path / "out", options)
    assert not verify(tmp_path / "out")
    batch = SignalsReader(tmp_path / "out").read(slice(None))
    assert batch.tokens_RT.shape[1] == max(LENGTHS)
    planes = {name: plane for name, plane in vars(batch).items() if "_RT" in name and plane is not None}
    flat = {name: plane.reshape(-1, *plane.shape[2:]) for name, plane in planes.items()}
    starts = np.flatnonzero(flat["flags_RT"] & DOC_START)
    assert len(starts) == len(documents)
    for start, (tokens, exact) in zip(starts, documents, strict=True):
        at = slice(start, start + len(tokens))
        scored = slice(start, start + len(tokens) - 1)
        assert (flat["tokens_RT"][at] == tokens).all()
        assert (flat["flags_RT"][at] & LOSS > 0).tolist() == [True] * (len(tokens) - 1) + [False]
        assert (flat["ids_RTK"][scored] == exact.ids_BTK[0, :-1]).mean() > 0.98  # equals may change places
        np.testing.assert_allclose(np.exp(flat["logp_RTK"][scored]), np.exp(exact.logp_BTK[0, :-1]), atol=2e-3)
        np.testing.assert_allclose(np.exp(flat["tail_RT"][scored]), np.exp(exact.tail_BT[0, :-1]), atol=2e-3)
        among = (exact.ids_BTK[0, :-1] == tokens[1:, None]).any(-1)
        known = flat["lp_next_RT"][scored]
        assert (np.isfinite(known) == among).all()
        np.testing.assert_allclose(known[among], exact.lp_next_BT[0, :-1][among], atol=5e-3)
    rest = np.isin(
        np.arange(len(flat["tokens_RT"])),
        np.concatenate([s + np.arange(len(t)) for s, (t, _) in zip(starts, documents, strict=True)]),
    )
    assert (flat["flags_RT"][~rest] == PAD).all()
    info = imported.manifest.imported[0]
    unknown = sum(int((~(e.ids_BTK[0, :-1] == t[1:, None]).any(-1)).sum()) for t, e in documents)
    assert (info.format, info.tail_floor, info.next_unknown) == ("distillkit", TAIL_FLOOR, unknown)
    figures = imported.manifest.splits["train"].statistics
    assert figures["targets"] == sum(LENGTHS) - len(LENGTHS)
    assert figures["observed_in_top_k"] == pytest.approx(1 - unknown / figures["targets"])
    assert figures["teacher_nll"] is None
    assert figures["tokens"] == sum(LENGTHS) - (0 if whole else len(LENGTHS))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["half", "curve", "residuals"])
def test_lossy_captures_make_caches_that_prove_themselves(documents, options, tmp_path, name):
    """Rounded values need not be in order nor sum to 1: they are sorted, and head + tail = 1 all the same."""
    write_compressed(tmp_path / "data", documents, LAYOUTS[name])
    import_cache(tmp_path / "data", tmp_path / "out", replace(options, variant="compact", k=12))
    assert not verify(tmp_path / "out")
    batch = SignalsReader(tmp_path / "out").read(slice(None))
    assert batch.ids_RTK.shape[-1] == 12
    total = np.exp(batch.logp_RTK.astype("f8")).sum(-1) + np.exp(batch.tail_RT.astype("f8"))
    np.testing.assert_allclose(total, 1, atol=1e-3)
    exact = documents[0][1]
    scored = len(documents[0][0]) - 1
    decoded = np.exp(batch.logp_RTK[0, :scored].astype("f8")).sum(-1)
    np.testing.assert_allclose(decoded, np.exp(exact.logp_BTK[0, :scored, :12].astype("f8")).sum(-1), atol=0.03)


def test_a_curve_that_says_more_than_1_is_scaled_and_exact_values_stay(options, tmp_path):
    """One exact value and a coarse fit, as DistillKit recommends where storage is scarce, overshoots peaked tokens."""
    sharp = spoken(4, [30, 30], 16, scale=8.0)
    budget = {"exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"]}
    fitted = np.exp(compress(sharp[0][1].logp_BTK[0], SETTINGS | budget)[1]).sum(-1)
    assert fitted.max() > 1.05
    write_compressed(tmp_path / "data", sharp, budget)
    import_cache(tmp_path / "data", tmp_path / "out", options)
    batch = SignalsReader(tmp_path / "out").read(slice(None))
    scored = batch.flags_RT & LOSS > 0
    top = np.concatenate([exact.logp_BTK[0, :-1, 0] for _, exact in sharp])
    np.testing.assert_allclose(batch.logp_RTK[scored][:, 0], top, rtol=0.01, atol=2e-3)
    total = np.exp(batch.logp_RTK.astype("f8")).sum(-1) + np.exp(batch.tail_RT.astype("f8"))
    np.testing.assert_allclose(total, 1, atol=1e-3)


def test_rows_that_were_packed_are_taken_apart(documents, options, tmp_path):
    """`attention_mask` numbers the documents of a packed row; 0 is padding. None predicts into the next."""
    first, second = documents[0], documents[1]
    packed = (np.concatenate([first[0], second[0], [3, 3]]), _joined(first[1], second[1], 2))
    mask = [[1] * 20 + [2] * 9 + [0] * 2]
    write_compressed(tmp_path / "data", [packed], {}, whole=True, attention_mask=mask)
    import_cache(tmp_path / "data", tmp_path / "out", replace(options, row_tokens=40))
    batch = SignalsReader(tmp_path / "out").read([0])
    assert np.flatnonzero(batch.flags_RT[0] & DOC_START).tolist() == [0, 20]
    assert np.flatnonzero(batch.flags_RT[0] & LOSS).tolist() == [*range(19), *range(20, 28)]
    assert (batch.flags_RT[0, 29:] == PAD).all()
    assert np.isnan(batch.lp_next_RT[0, 19])


def _joined(first, second, padding):
    blank = np.zeros((1, padding, 16))
    filler = {
        "ids_BTK": blank + np.arange(16),
        "logp_BTK": blank - 5,
        "tail_BT": blank[..., 0],
        "lp_next_BT": blank[..., 0],
    }
    parts = {name: np.concatenate([getattr(first, name), getattr(second, name), filler[name]], 1) for name in filler}
    return replace(first, **parts)


def test_labels_and_padding_behind_a_text_say_what_counts(documents, options, tmp_path):
    tokens = np.append(documents[0][0][:-1], 3)  # <pad>, as a capture adds it
    labels = [[-100] * 8 + tokens[8:].tolist()]
    write_compressed(tmp_path / "plain", [(tokens, documents[0][1])], {})
    write_compressed(tmp_path / "labelled", [(tokens, documents[0][1])], {}, labels=labels)
    import_cache(tmp_path / "plain", tmp_path / "a", options)
    import_cache(tmp_path / "labelled", tmp_path / "b", options)
    counted = [np.flatnonzero(SignalsReader(tmp_path / n).read([0]).flags_RT & LOSS).tolist() for n in "ab"]
    assert counted == [list(range(18)), list(range(7, 19))]


def test_the_older_layout_and_the_plain_one_are_read(documents, options, tmp_path):
    """64-bit words with the first id lowest and float values; lists of ids and log-probs as they are."""
    bits, per_word = 6, 10  # of 64 tokens
    rows = {"input_ids": [], "packed_indices": [], "exact_values": [], "coeffs": [], "token_ids": [], "top_values": []}
    for tokens, exact in documents:
        ids, logp = exact.ids_BTK[0].astype(np.uint64), exact.logp_BTK[0].astype(np.float64)
        padded = np.pad(ids, ((0, 0), (0, 4))).reshape(len(ids), 2, per_word)
        words = (padded << (np.arange(per_word, dtype=np.uint64) * np.uint64(bits))).sum(-1, dtype=np.uint64)
        ranks = np.arange(1, 9)
        terms = np.stack([ranks**-0.0, ranks**-1.0, ranks**-2.0, np.sqrt(ranks)], -1)
        curve = np.linalg.lstsq(terms, logp[:, 8:].T, rcond=None)[0].T
        found = (tokens, words, logp[:, :8], curve, ids, logp)
        for name, value in zip(rows, found, strict=True):
            rows[name].append(value.tolist())
    names = {"legacy": list(rows)[:4], "plain": ["input_ids", "token_ids", "top_values"]}
    legacy = tmp_path / "legacy.yaml"
    legacy.write_text(
        "teacher:\n  kind: dataset\n  legacy_logit_compression:\n    vocab_size: 64\n    k: 16\n    exact_k: 8\n"
        "    polynomial_degree: 2\n    with_sqrt_term: true\n"
    )
    for name, fields in names.items():
        pq.write_table(pa.table({field: rows[field] for field in fields}), tmp_path / f"{name}.parquet")
        config = legacy if name == "legacy" else None
        import_cache(tmp_path / f"{name}.parquet", tmp_path / name, replace(options, config=config))
        batch = SignalsReader(tmp_path / name).read([0])
        tokens, exact = documents[0]
        probabilities = np.exp(batch.logp_RTK[0, : len(tokens) - 1])
        np.testing.assert_allclose(
            probabilities, np.exp(exact.logp_BTK[0, :-1]), atol=0.02 if name == "legacy" else 2e-3
        )
        assert (batch.tokens_RT[0, : len(tokens)] == tokens).all()


def test_a_stopped_import_goes_on_and_ends_with_the_same_bytes(documents, options, tmp_path, monkeypatch):
    monkeypatch.setattr("lmdistill.signals.exchange.import_writing.SHARD_BYTES", 1)  # a row a shard
    write_compressed(tmp_path / "data", documents, {})
    import_cache(tmp_path / "data", tmp_path / "whole", options)
    commit, written = ShardWriter.commit, []

    def stopped(writer: ShardWriter):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(writer.job.file)
        return commit(writer)

    monkeypatch.setattr(ShardWriter, "commit", stopped)
    with pytest.raises(KeyboardInterrupt):
        import_cache(tmp_path / "data", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ShardWriter, "commit", lambda writer: written.append(writer.job.file) or commit(writer))
    import_cache(tmp_path / "data", tmp_path / "out", options)
    assert len(written) == len(set(written)) > 3
    for path in (tmp_path / "whole").glob("*.*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_held_out_documents_are_chosen_by_their_tokens(options, tmp_path):
    """Order and number of other documents do not matter; nothing is lost, nothing is in both."""
    documents = spoken(5, [12] * 40, 16)
    write_compressed(tmp_path / "data", documents, {})
    write_compressed(tmp_path / "turned", documents[::-1], {})
    held = {}
    for name in ("data", "turned"):
        import_cache(tmp_path / name, tmp_path / f"out-{name}", replace(options, valid_fraction=0.3))
        splits = {
            split: SignalsReader(tmp_path / f"out-{name}", split).read(slice(None)) for split in ("train", "valid")
        }
        held[name] = {split: {tuple(row) for row in batch.tokens_RT} for split, batch in splits.items()}
    assert held["data"] == held["turned"]
    assert not held["data"]["train"] & held["data"]["valid"]
    assert held["data"]["train"] | held["data"]["valid"] == {tuple(tokens) for tokens, _ in documents}


def test_a_folder_of_many_files_is_read_in_the_order_of_their_numbers(documents, options, tmp_path):
    write_compressed(tmp_path / "data", documents, {})
    table = pq.read_table(tmp_path / "data" / "data_0.parquet")
    (tmp_path / "data" / "data_0.parquet").unlink()
    for number, row in enumerate([0, 1, 2, 3, 4, 5]):
        pq.write_table(table.slice(row, 1), tmp_path / "data" / f"data_{number + 8}.parquet")
    write_compressed(tmp_path / "one", documents, {})
    ours, theirs = (import_cache(tmp_path / n, tmp_path / f"out-{n}", options).manifest for n in ("data", "one"))
    assert ours.splits == theirs.splits


def test_arrow_as_datasets_saves_it_is_read_too(documents, options, tmp_path):
    import datasets

    write_compressed(tmp_path / "data", documents, {})
    datasets.Dataset(pq.read_table(tmp_path / "data" / "data_0.parquet")).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "data" / "compression_config.yaml").rename(tmp_path / "saved" / "compression_config.yaml")
    assert import_cache(tmp_path / "saved", tmp_path / "out", options).manifest.splits["train"].rows == 5
