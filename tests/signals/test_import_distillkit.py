"""`cache import --format distillkit`: what a capture says is what the cache says, and what it cannot say is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_data import SETTINGS, compress, pack_bits, save_tokenizer, spoken, write_compressed
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdistill.corpus.format import DOC_START, LOSS, PAD
from lmdistill.errors import AssetError, IntegrityError, LmdistillError, PreflightError
from lmdistill.signals.exchange.distillkit_codec import Compression, unpack_bits
from lmdistill.signals.exchange.document import TAIL_FLOOR
from lmdistill.signals.exchange.importing import ImportOptions, import_cache
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.writer import ShardWriter

LENGTHS = [20, 9, 31, 12, 31, 17]
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def documents():
    return spoken(3, LENGTHS, 16)


@pytest.fixture
def options(tokenizer):
    return ImportOptions("distillkit", tokenizer, teacher="toy")


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


def plain(path: Path, tokens, ids, values) -> Path:
    """A capture in the plain layout."""
    lists = {"input_ids": tokens, "token_ids": ids, "top_values": values}
    pq.write_table(pa.table({name: [np.asarray(value).tolist()] for name, value in lists.items()}), path)
    return path


@pytest.fixture
def sample(documents):
    """Tokens, ids and log-probs of one document, to be spoiled."""
    tokens, exact = documents[2]
    return tokens.copy(), exact.ids_BTK[0].copy(), exact.logp_BTK[0].astype(np.float64)


def test_entries_in_any_order_are_sorted(sample, options, tmp_path):
    tokens, ids, logp = sample
    order = np.random.default_rng(0).permutation(16)
    straight = plain(tmp_path / "a.parquet", tokens, ids, logp)
    mixed = plain(tmp_path / "b.parquet", tokens, ids[:, order], logp[:, order])
    ours, theirs = (import_cache(path, tmp_path / path.stem, options).manifest for path in (straight, mixed))
    assert ours.splits == theirs.splits


def _positive(ids, logp):
    logp[4, 0] = 0.3


def _too_much(ids, logp):
    logp[4] = -1.0


def _no_number(ids, logp):
    logp[4, 3] = np.nan


def _twice(ids, logp):
    ids[4, 3] = ids[4, 5]


def _foreign(ids, logp):
    ids[4, 3] = 70


def _negative(ids, logp):
    ids[4, 3] = -1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_positive, r"position 4: a probability is above 1"),
        (_too_much, r"position 4: the entries' probabilities sum to 5.886(.|\n)*--renormalize"),
        (_no_number, r"position 4: a log-prob is NaN"),
        (_twice, r"position 4: an id comes twice"),
        (_foreign, r"position 4: id 70 is no token of the tokenizer(.|\n)*another tokenizer than --tokenizer"),
        (_negative, r"position 4: id -1 is no token"),
    ],
)
def test_what_no_teacher_can_have_said_is_refused_with_its_place(sample, options, tmp_path, spoil, message):
    tokens, ids, logp = sample
    ids = ids.astype(np.int64)
    spoil(ids, logp)
    with pytest.raises(PreflightError, match=rf"a.parquet, row 0, {message}"):
        import_cache(plain(tmp_path / "a.parquet", tokens, ids, logp), tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_logits_are_taken_where_that_is_asked(sample, options, tmp_path):
    tokens, ids, logp = sample
    path = plain(tmp_path / "a.parquet", tokens, ids, logp + 7)
    with pytest.raises(PreflightError, match="above 1"):
        import_cache(path, tmp_path / "out", options)
    imported = import_cache(path, tmp_path / "out", replace(options, renormalize=True))
    head = np.exp(SignalsReader(tmp_path / "out").read([0]).logp_RTK[0, :-1].astype("f8")).sum(-1)
    np.testing.assert_allclose(head, 1, atol=1e-3)
    assert imported.manifest.imported[0].renormalised
    assert any("entries sum to 1" in line for line in imported.notes())


def test_temperature_is_undone_where_nothing_is_missing_and_refused_elsewhere(sample, options, tmp_path):
    tokens, ids, logp = sample
    hot = replace(options, temperature=2.0)
    with pytest.raises(PreflightError, match=r"temperature 2.0 cannot be undone(.|\n)*miss 0\.\d+ of the mass"):
        import_cache(plain(tmp_path / "a.parquet", tokens, ids, logp), tmp_path / "out", hot)
    whole = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
    heated = whole / 2 - np.log(np.exp(whole / 2).sum(-1, keepdims=True))
    import_cache(plain(tmp_path / "b.parquet", tokens, ids, heated), tmp_path / "out", hot)
    found = np.exp(SignalsReader(tmp_path / "out").read([0]).logp_RTK[0, :-1])
    np.testing.assert_allclose(found, np.exp(whole[:-1]), atol=2e-3)


@pytest.mark.parametrize("by", [1, -1])
def test_rows_shifted_by_one_are_found_although_the_source_tells_no_next_log_prob(options, tmp_path, by):
    """Text tells: the entries hold the next token far more often than its neighbours."""
    documents = spoken(9, [60, 60], 8, scale=5.0)
    for _, exact in documents:
        for plane in (exact.ids_BTK, exact.logp_BTK):
            plane[:] = np.roll(plane, by, axis=1)
    write_compressed(tmp_path / "data", documents, {"k": 8, "exact_k": 8})
    with pytest.raises(
        PreflightError, match=rf"shifted by [{-by:+d}]* against the tokens(.|\n)*the next token is among"
    ):
        import_cache(tmp_path / "data", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_once_imported_a_shift_fails_at_the_first_read(options, tmp_path):
    """The proof of a captured cache holds for what is known: lp_next of tokens among the entries."""
    write_compressed(tmp_path / "data", spoken(9, [60], 8), {"k": 8, "exact_k": 8})
    import_cache(tmp_path / "data", tmp_path / "out", options)
    reader = SignalsReader(tmp_path / "out", verify=False)
    raw = reader._raw(np.array([0]))
    raw["lp_next"][0, :-1] = raw["lp_next"][0, 1:]
    reader._raw = lambda rows: raw
    with pytest.raises(IntegrityError, match="do not belong to its tokens"):
        reader.read([0])


def test_another_tokenizer_is_refused_with_the_conflicts_listed(documents, options, tmp_path):
    """By the capture's vocabulary, by the tokenizer beside the data, by the text beside the tokens."""
    write_compressed(tmp_path / "small", documents, {"d": 60})
    with pytest.raises(PreflightError, match=r"captured for a vocabulary of 60, the tokenizer has 64(.|\n)*'w60'"):
        import_cache(tmp_path / "small", tmp_path / "out", options)
    write_compressed(tmp_path / "beside", documents, {})
    save_tokenizer(tmp_path / "beside", prefix="v")
    with pytest.raises(PreflightError, match=r"different token maps: 60 ids differ(.|\n)*4: 'v4' / 'w4'"):
        import_cache(tmp_path / "beside", tmp_path / "out", options)
    text = [" ".join(f"w{token}" for token in tokens) for tokens, _ in documents]
    write_compressed(tmp_path / "text", documents, {}, text=text)
    import_cache(tmp_path / "text", tmp_path / "out", options)
    text[1] = text[1].replace("w", "w1", 1)
    write_compressed(tmp_path / "other", documents, {}, text=text)
    with pytest.raises(PreflightError, match=r"row 1: tokens and text contradict the tokenizer(.|\n)*1 tokens differ"):
        import_cache(tmp_path / "other", tmp_path / "out2", options)


def test_missing_settings_and_settings_of_another_capture_are_told(documents, options, tmp_path):
    write_compressed(tmp_path / "data", documents, {})
    settings_file = tmp_path / "data" / "compression_config.yaml"
    text = settings_file.read_text()
    settings_file.write_text(text.replace("exact_dtype: float32", "exact_dtype: bfloat16"))
    with pytest.raises(
        PreflightError, match=r"row 0: field 'compressed_logprobs' has 64 values at position 0(.|\n)*32"
    ):
        import_cache(tmp_path / "data", tmp_path / "out", options)
    settings_file.write_text(text.replace("exact_k", "exakt_k"))
    with pytest.raises(PreflightError, match=r"exact_k: Field required; exakt_k: Extra inputs"):
        import_cache(tmp_path / "data", tmp_path / "out", options)
    settings_file.unlink()
    with pytest.raises(PreflightError, match=r"no compression_config.yaml(.|\n)*--config"):
        import_cache(tmp_path / "data", tmp_path / "out", options)
    moved = tmp_path / "mine.yaml"
    moved.write_text(
        "teacher:\n  kind: dataset\n  logprob_compressor:\n" + "".join(f"    {x}\n" for x in text.splitlines())
    )
    assert import_cache(tmp_path / "data", tmp_path / "out", replace(options, config=moved)).manifest.layout.k == 16


def test_malformed_files_are_told_with_file_row_and_field(documents, options, tmp_path):
    def refused(message: str, source: Path) -> None:
        with pytest.raises(LmdistillError, match=message):
            import_cache(source, tmp_path / "out", options)

    refused("there is no .*nowhere", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"no data in .*empty(.|\n)*\.parquet", tmp_path / "empty")
    write_compressed(tmp_path / "data", documents, {})
    file = tmp_path / "data" / "data_0.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop(["bytepacked_indices"]), file)
    refused(
        r"data_0.parquet is no DistillKit capture(.|\n)*its fields are input_ids, compressed_logprobs",
        tmp_path / "data",
    )
    short = table["input_ids"].to_pylist()
    short[3] = short[3][:-4]
    pq.write_table(table.set_column(0, "input_ids", pa.array(short)), file)
    refused(r"data_0.parquet, row 3: field 'compressed_logprobs' has 11 rows(.|\n)*each of 8 tokens", tmp_path / "data")
    pq.write_table(table, file)
    file.write_bytes(file.read_bytes()[:-50])
    refused("data_0.parquet cannot be read as parquet", tmp_path / "data")


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


def test_unfit_wishes_are_refused(documents, options, tmp_path):
    write_compressed(tmp_path / "data", documents, {})
    for changes, message in (
        ({"format": "distilkit"}, "did you mean 'distillkit'"),
        ({"alignment": "nxt"}, "did you mean 'next'"),
        ({"temperature": 0.0}, "--temperature is above 0"),
        ({"k": 17}, "17 entries of a token are asked for, the data has 16"),
        ({"row_tokens": 1}, "no document has two tokens"),
        ({"variant": "sampled"}, "not draws"),
        ({"alignment": "same"}, "--alignment goes with --format axolotl"),
        ({"drop_unmatched": True}, "--drop-unmatched goes with --format axolotl"),
    ):
        with pytest.raises(LmdistillError, match=message):
            import_cache(tmp_path / "data", tmp_path / "out", replace(options, **changes))
    with pytest.raises(AssetError, match="no data in"):
        import_cache(tmp_path / "data" / "compression_config.yaml", tmp_path / "out", options)
