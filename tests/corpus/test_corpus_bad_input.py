"""Each mistake in sources or keys is one clear message that names it, where possible before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_samples import make_tokenizer
from pydantic import ValidationError

from lmdistill.corpus.config import CorpusConfig
from lmdistill.corpus.format import CorpusReader
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import ModelRef, PreflightContext, StageContext
from lmdistill.stages.corpus import CorpusStage

Make = Callable[..., CorpusReader]
Write = Callable[..., str]


@pytest.fixture
def problems(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., str]:
    """What preflight says of a configuration, all messages in one."""

    def said(tokenizer: Path | None = None, **keys: Any) -> str:
        config = CorpusConfig.model_validate(keys)
        teacher = ModelRef("teacher", tokenizer or tokenizer_folder, "0")
        ctx = PreflightContext("corpus", config, {}, teacher, tmp_path)
        return "\n".join(str(error) for error in CorpusStage().preflight(ctx))

    return said


Problems = Callable[..., str]


def test_a_good_configuration_has_no_problem(problems: Problems, write: Write) -> None:
    assert problems(sources=[write([{"text": "x"}])]) == ""


def test_a_missing_file_is_named_with_the_nearest(problems: Problems, write: Write) -> None:
    path = write([{"text": "x"}], "passages.jsonl")
    said = problems(sources=[path.replace("passages", "pasages")])
    assert "there is no file or folder" in said and "did you mean 'passages.jsonl'" in said


def test_a_missing_field_lists_what_there_is(problems: Problems, make: Make, write: Write) -> None:
    source = {"source": write([{"texts": "x", "id": 1}]), "group": "id"}
    said = problems(sources=[source])
    assert "has no field 'text'; did you mean 'texts'" in said and "'id'" in said
    with pytest.raises(PreflightError, match="has no field 'text'"):
        make(sources=[source])


def test_a_wrong_sha256_is_refused_with_both_digests(problems: Problems, write: Write) -> None:
    said = problems(sources=[{"source": write([{"text": "x"}]), "sha256": "0" * 64}])
    assert "not the file that the recipe asks for" in said
    assert "0" * 64 in said and "sha256 is " in said


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', ("latin.jsonl, line 1: not a JSON record", "not UTF-8")),
        ("cut.jsonl", b'\n{"text": "x"\n', ("cut.jsonl, line 2: not a JSON record", "column")),
        ("number.jsonl", b"7\n", ("number.jsonl, line 1: not a JSON record", "a int, not an object")),
        ("empty.jsonl", b"\n\n", ("empty.jsonl has no records", "check the file")),
        ("broken.parquet", b"PAR1 and no more", ("broken.parquet cannot be read as parquet", "the file itself")),
        ("broken.jsonl.gz", b"not gzip", ("broken.jsonl.gz cannot be read as jsonl", "the file itself")),
    ],
)
def test_an_unreadable_file_is_told_before_work(
    problems: Problems, tmp_path: Path, name: str, content: bytes, messages: tuple[str, ...]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = problems(sources=[str(path)])
    assert all(message in said for message in messages), said


def test_a_list_of_records_is_no_mistake(problems: Problems, tmp_path: Path, make: Make) -> None:
    path = tmp_path / "list.json"
    path.write_text('[\n  {"text": "one two three"},\n  {"text": "four five six"}\n]\n')
    assert problems(sources=[str(path)]) == ""
    assert make(sources=[str(path)], sequence_length=4).meta.splits["train"].documents == 2


def test_two_problems_are_told_at_once(problems: Problems, write: Write) -> None:
    said = problems(sources=[write([{"a": 1}]), "nowhere.jsonl"], separator="<|nothing|>")
    assert "no field" in said and "nowhere.jsonl" in said and "no separator '<|nothing|>'" in said


def test_conversations_need_a_template(problems: Problems, write: Write, tmp_path: Path) -> None:
    bare = make_tokenizer(tmp_path / "bare", template=None)
    said = problems(bare, sources=[{"source": write([{"m": []}]), "messages": "m"}])
    assert "the tokenizer has no chat template" in said


def test_rows_longer_than_the_model_are_refused(problems: Problems, write: Write, tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text('{"max_position_embeddings": 128}')
    assert "maximum of 128 tokens" in problems(folder, sources=[write([{"text": "x"}])], sequence_length=129)


def test_an_unknown_format_says_what_to_set(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"x")
    assert "set `format:`" in problems(sources=[str(tmp_path / "data.bin")])


@pytest.mark.parametrize(
    ("line", "why"),
    [('{"text": "a"', "delimiter"), ('"just a string"', "a str, not an object"), ('{"text": }', "Expecting value")],
)
def test_a_malformed_line_is_named_by_its_number(make: Make, tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n' + line + '\n{"text": "three"}\n')
    with pytest.raises(PreflightError, match=r"bad\.jsonl, line 4") as caught:
        make(sources=[str(path)])
    assert why in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(PreflightError, match=r"latin\.jsonl, line 2"):
        make(sources=[str(path)])


def test_a_field_that_is_no_text_is_named_by_record(make: Make, write: Write) -> None:
    with pytest.raises(PreflightError, match="record 1: field 'text' is a int"):
        make(sources=[write([{"text": 5}, {"text": 6}])])


def test_nothing_left_is_an_error(make: Make, write: Write) -> None:
    with pytest.raises(PreflightError, match="the corpus is empty"):
        make(sources=[write([{"text": ""}, {"text": None}])])


def test_a_split_without_documents_is_an_error(make: Make, write: Write) -> None:
    with pytest.raises(PreflightError, match="nothing for the split 'valid'"):
        make(sources=[write([{"text": "one document"}] * 9)], valid_fraction=0.001)


def test_keys_are_checked(write: Write) -> None:
    path = write([{"text": "x"}])
    for keys, why in (
        ({"sources": []}, "at least 1"),
        ({"sources": [{"source": path, "text": "a", "messages": "b"}]}, "not both"),
        ({"sources": [path], "train_tokens": 10, "sequence_length": 16}, "less than one row"),
        ({"sources": [path], "packing": "tight"}, "'concat', 'isolate' or 'single'"),
    ):
        with pytest.raises(ValidationError, match=why):
            CorpusConfig.model_validate(keys)


def test_a_stage_without_teacher_or_tokenizer_says_what_to_add(write: Write, tmp_path: Path) -> None:
    config = CorpusConfig.model_validate({"sources": [write([{"text": "x"}])]})
    ctx = StageContext("corpus", config, {}, None, tmp_path / "out", tmp_path / "work")
    with pytest.raises(LmdistillError, match="needs a teacher"):
        CorpusStage().run(ctx)
