"""`cache import --format axolotl`: prepared rows of both alignments, and conversations whose place is found."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_data import SPECIAL, TEMPLATE, prepared, save_tokenizer, spoken, write_lines

from lmdistill.corpus.format import LOSS
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.signals.exchange.importing import ImportOptions, import_cache
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader

K = 8
USER, ASSISTANT, END, _ = range(len(SPECIAL))


@pytest.fixture(scope="module")
def documents():
    return spoken(3, [20, 31, 24], K)


@pytest.fixture
def options(tokenizer):
    return ImportOptions("axolotl", tokenizer)


def conversation(tokens, exact, prompt=6):
    """Messages whose rendering ends with what the teacher wrote after `prompt` words, and its entries for each token.

    The written tokens are the words from `prompt` on and the closing one.
    """
    words = [f"w{token}" for token in tokens]
    messages = [
        {"role": "user", "content": " ".join(words[: prompt - 1])},
        {"role": "assistant", "content": " ".join(words[prompt:])},
    ]
    # The toy teacher says token t after token t - 1; before the first written word stands <assistant>, which counts as
    # token prompt - 1 did.
    written = []
    for at in range(prompt - 1, len(tokens) - 1):
        row = dict(zip(exact.ids_BTK[0, at].tolist(), exact.logp_BTK[0, at].tolist(), strict=True))
        if tokens[at + 1] not in row:  # a server names the token it wrote, however unlikely it was
            row.popitem()
            row[int(tokens[at + 1])] = -12.0
        written.append(list(row.items()))
    return messages, written, [(END, -0.01)]


def named(rows):
    return [[{"token": f"token_id:{token}", "logprob": logp} for token, logp in row] for row in rows]


def record(document):
    messages, rows, closing = conversation(*document)
    return {"messages": messages, "logprobs": named([*rows, _padded(closing)])}


def _padded(closing):
    return closing + [(5 + i, -9.0 - i) for i in range(K - 1)]


@pytest.mark.parametrize("alignment", ["next", "same"])
def test_prepared_rows_are_read_in_either_alignment(documents, options, tmp_path, alignment):
    """Positions without a label say nothing; the others say what the teacher said of the token after them."""
    shift = 1 if alignment == "same" else 0
    path = write_lines(tmp_path / "data.jsonl", [prepared(*document, prompt=7, shift=shift) for document in documents])
    imported = import_cache(path, tmp_path / "out", replace(options, alignment=alignment))
    assert not verify(tmp_path / "out")
    batch = SignalsReader(tmp_path / "out").read(slice(None))
    for row, (tokens, exact) in enumerate(documents):
        counted = np.flatnonzero(batch.flags_RT[row] & LOSS)
        assert counted.tolist() == list(range(6, len(tokens) - 1))
        assert (batch.tokens_RT[row, : len(tokens)] == tokens).all()
        wanted = np.exp(exact.logp_BTK[0, 6 : len(tokens) - 1])
        np.testing.assert_allclose(np.exp(batch.logp_RTK[row, counted]), wanted, atol=2e-3)
        assert np.isnan(batch.lp_next_RT[row, :6]).all()
        np.testing.assert_allclose(batch.logp_RTK[row, :6], -np.log(64), atol=0.01)  # nothing is known there
    figures = imported.manifest.splits["train"].statistics
    assert figures["tokens"] == figures["targets"] == sum(len(tokens) - 7 for tokens, _ in documents)
    assert imported.manifest.imported[0].alignment == alignment


@pytest.mark.parametrize(("shift", "told", "other"), [(1, "next", "same"), (0, "same", "next")])
def test_the_other_alignment_is_found_and_named(options, tmp_path, shift, told, other):
    documents = spoken(5, [60, 60], K, scale=5.0)
    path = write_lines(tmp_path / "data.jsonl", [prepared(*document, prompt=1, shift=shift) for document in documents])
    with pytest.raises(PreflightError, match=rf"shifted by(.|\n)*import with --alignment {other}"):
        import_cache(path, tmp_path / "out", replace(options, alignment=told))
    import_cache(path, tmp_path / "out", replace(options, alignment=other))


def test_renormalised_entries_leave_the_floor_and_that_is_said(documents, options, tmp_path):
    """axolotl's preparation scales the entries to 1: the tail is gone before the import."""
    records = [prepared(*document, prompt=2) for document in documents]
    for each in records:
        logp = np.array(each["target_logprobs"])
        each["target_logprobs"] = (logp - np.log(np.exp(logp).sum(-1, keepdims=True) + 1e-300)).tolist()
    imported = import_cache(write_lines(tmp_path / "data.jsonl", records), tmp_path / "out", options)
    batch = SignalsReader(tmp_path / "out").read([0])
    counted = batch.flags_RT[0] & LOSS > 0
    assert batch.tail_RT[0, counted].max() < np.log(1e-3)
    assert any("entries sum to 1" in line for line in imported.notes())


def test_varying_numbers_of_entries_are_kept_as_they_are(documents, options, tmp_path):
    """Positions with fewer entries keep fewer; --k for all of them is refused where some have not so many."""
    records = [prepared(*document, prompt=2) for document in documents]
    for name in ("target_token_ids", "target_logprobs", "target_mask"):
        records[0][name][5] = records[0][name][5][:3]
    path = write_lines(tmp_path / "data.jsonl", records)
    manifest = import_cache(path, tmp_path / "out", options).manifest
    assert (manifest.layout.k, manifest.layout.variable) == (K, True)
    kept = np.isfinite(SignalsReader(tmp_path / "out").read([0]).logp_RTK[0]).sum(-1)
    assert (kept[5], kept[6]) == (3, K)
    assert not verify(tmp_path / "out")
    assert not import_cache(path, tmp_path / "three", replace(options, k=3)).manifest.layout.variable


@pytest.mark.parametrize("spelling", ["ids", "v2", "server", "words", "nested"])
def test_conversations_are_placed_by_what_was_written(documents, options, tmp_path, spelling):
    """As vLLM names ids, with ids in a field of their own, as a chat server answers, or as text."""
    records = []
    for document in documents:
        messages, rows, closing = conversation(*document)
        rows = [*rows, _padded(closing)]
        tokens = [*document[0][6:].tolist(), END]
        words = {END: "<end>"}
        if spelling == "ids":
            data = {"logprobs": named(rows)}
        elif spelling == "nested":
            data = {"logprobs": [named(rows)]}
        elif spelling == "v2":
            data = {
                "logprobs": [[x for _, x in row] for row in rows],
                "target_token_ids": [[i for i, _ in row] for row in rows],
            }
        elif spelling == "words":
            data = {"logprobs": [[{"token": words.get(i, f"w{i}"), "logprob": x} for i, x in row] for row in rows]}
        else:
            likely = named(rows)
            said = [
                {"token": f"token_id:{token}", "logprob": -3.0, "top_logprobs": entries}
                for token, entries in zip(tokens, likely, strict=True)
            ]
            data = {"logprobs": {"content": said}}
        records.append({"messages": messages, **data})
    import_cache(write_lines(tmp_path / "data.jsonl", records), tmp_path / "out", options)
    assert not verify(tmp_path / "out")
    batch = SignalsReader(tmp_path / "out").read([0])
    tokens, exact = documents[0]
    rendered = [USER, *tokens[:5], END, ASSISTANT, *tokens[6:], END]
    assert batch.tokens_RT[0, : len(rendered)].tolist() == rendered
    counted = np.flatnonzero(batch.flags_RT[0] & LOSS)
    assert counted.tolist() == list(range(7, 7 + len(tokens) - 6 + 1))
    found = np.exp(batch.logp_RTK[0, counted[:-1], :3])
    np.testing.assert_allclose(found, np.exp(exact.logp_BTK[0, 5:-1, :3]), atol=2e-3)
    assert batch.ids_RTK[0, counted[-1], 0] == END


def test_what_a_template_puts_behind_the_last_token_does_not_shift_the_rest(documents, tmp_path):
    """Rows counted from the end of the conversation would be off by as many tokens."""
    trailing = "<end> {% if m.role == 'assistant' %}w9 w9 {% endif %}"
    folder = save_tokenizer(tmp_path / "tokenizer", template=TEMPLATE.replace("<end> ", trailing))
    path = write_lines(tmp_path / "data.jsonl", [record(document) for document in documents])
    import_cache(path, tmp_path / "out", ImportOptions("axolotl", folder))
    batch = SignalsReader(tmp_path / "out").read([0])
    counted = np.flatnonzero(batch.flags_RT[0] & LOSS)
    assert counted.tolist() == list(range(7, 7 + len(documents[0][0]) - 6 + 1))


def test_parquet_and_a_json_list_hold_the_same_conversations(documents, options, tmp_path):
    records = [record(document) for document in documents]
    (tmp_path / "a.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    (tmp_path / "c").mkdir()
    shared = [
        {
            "conversations": [
                {"from": "human", "value": r["messages"][0]["content"]},
                {"from": "gpt", "value": r["messages"][1]["content"]},
            ],
            "kd": r["logprobs"],
        }
        for r in records
    ]
    write_lines(tmp_path / "c" / "part.jsonl", shared)
    named_fields = replace(options, messages_field="conversations", logprobs_field="kd")
    manifests = [import_cache(tmp_path / "a.json", tmp_path / "out-a", options).manifest]
    manifests.append(
        import_cache(tmp_path / "b.parquet", tmp_path / "out-b", replace(options, teacher="a.json")).manifest
    )
    manifests.append(import_cache(tmp_path / "c", tmp_path / "out-c", replace(named_fields, teacher="a.json")).manifest)
    assert manifests[0].splits == manifests[1].splits == manifests[2].splits


def test_conversations_that_do_not_fit_are_refused_or_left_out(documents, options, tmp_path):
    records = [record(document) for document in documents]
    records[1]["messages"][1]["content"] = records[1]["messages"][1]["content"].replace("w", "w1")
    path = write_lines(tmp_path / "data.jsonl", records)
    with pytest.raises(
        PreflightError, match=r"row 1: field 'logprobs' does not fit the conversation(.|\n)*--drop-unmatched"
    ):
        import_cache(path, tmp_path / "out", options)
    imported = import_cache(path, tmp_path / "out", replace(options, drop_unmatched=True))
    assert imported.unmatched == [f"{path}, row 1"]
    assert imported.outline.documents == 2
    assert any("1 conversations do not fit" in line for line in imported.notes())


def test_token_names_of_another_tokenizer_are_listed(documents, options, tmp_path):
    messages, rows, _ = conversation(*documents[0])
    entries = [[{"token": f"v{i}", "logprob": x} for i, x in row] for row in rows]
    path = write_lines(tmp_path / "data.jsonl", [{"messages": messages, "logprobs": entries}])
    with pytest.raises(
        PreflightError, match=r"row 0: \d+ token names do not fit the tokenizer(.|\n)*'v\d+' is no token"
    ):
        import_cache(path, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_token_ids": None}, r"field 'target_token_ids' is missing"),
        ({"target_logprobs": [[0.0]]}, r"field 'target_logprobs' has 1 rows(.|\n)*each of 20 tokens"),
        ({"target_logprobs": "none"}, r"field 'target_logprobs' is not a list of lists of numbers"),
        ({"labels": [4] * 20}, r"field 'labels' is 4 at position \d+(.|\n)*the token there"),
        ({"labels": [-100]}, r"field 'labels' has 1 entries"),
        ({"input_ids": ["a"] * 20}, r"field 'input_ids' is not a list of whole numbers"),
    ],
)
def test_malformed_records_are_told_with_file_row_and_field(documents, options, tmp_path, change, message):
    records = [prepared(*document, prompt=2) for document in documents]
    records[2] = prepared(*documents[0], prompt=2) | change
    path = write_lines(tmp_path / "data.jsonl", records)
    with pytest.raises(PreflightError, match=rf"data.jsonl, row 2: {message}"):
        import_cache(path, tmp_path / "out", options)
    assert [found.name for found in tmp_path.iterdir()] == ["data.jsonl"]


def test_lines_that_are_no_records_are_told_with_their_number(documents, options, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [prepared(*documents[0], prompt=2)])
    for line, message in (("{", "line 2: not a JSON record"), ("[1]", "line 2: not a JSON record(.|\n)*a list")):
        path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
        with pytest.raises(LmdistillError, match=message):
            import_cache(path, tmp_path / "out", options)


def test_other_data_is_told_what_is_expected(options, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": "w5 w6"}])
    with pytest.raises(
        PreflightError, match=r"no axolotl distillation data(.|\n)*its fields are text; expected input_ids"
    ):
        import_cache(path, tmp_path / "out", options)


def test_data_without_a_target_is_told(documents, options, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [prepared(*documents[0], prompt=30)])
    with pytest.raises(PreflightError, match="no position has log-probs"):
        import_cache(path, tmp_path / "out", options)


def test_the_entry_a_server_adds_for_the_written_token_makes_no_wider_cache(documents, options, tmp_path):
    """K + 1 entries where the written token was none of the K: its log-prob is known, the cache keeps K."""
    records = [record(document) for document in documents]
    extra = next(row for row in records[0]["logprobs"] if row[-1]["logprob"] == -12.0)
    extra.insert(-1, {"token": "token_id:4" if extra[0]["token"] != "token_id:4" else "token_id:5", "logprob": -11.5})
    names = [entry["token"] for entry in extra]
    extra[:] = [entry for place, entry in enumerate(extra) if entry["token"] not in names[:place]]
    assert len(extra) == K + 1
    import_cache(write_lines(tmp_path / "data.jsonl", records), tmp_path / "out", options)
    batch = SignalsReader(tmp_path / "out").read([0])
    assert batch.ids_RTK.shape[-1] == K
    assert (np.isclose(batch.lp_next_RT, -12.0) & (batch.flags_RT & LOSS > 0)).any()
