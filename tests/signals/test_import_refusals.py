"""`cache import --format distillkit`: entries in any order and scale; what cannot have been captured is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_data import save_tokenizer, spoken, write_compressed

from lmdistill.errors import AssetError, IntegrityError, LmdistillError, PreflightError
from lmdistill.signals.exchange.importing import import_cache
from lmdistill.signals.reader import SignalsReader


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
