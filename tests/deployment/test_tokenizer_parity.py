"""Tokenizers agree with llama.cpp: the real teacher on over 1,000 passages, every known pre-tokenizer by name.

The pre-tokenizers are proven with a vocabulary whose merges cross every boundary, so that any other split of a
probe text changes its ids.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lmdistill import assets
from lmdistill.asset_spec import AssetSpec
from lmdistill.checkpoints import load_tokenizer
from lmdistill.deployment import pretokenizers
from lmdistill.deployment.probes import SEEDS, probe_conversations, probe_texts
from lmdistill.deployment.tokenizer_parity import compare
from lmdistill.errors import AssetError, IntegrityError
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.teachers.gguf_import import GgufTokenizer, read_metadata, read_tokenizer, write_tokenizer

PASSAGES = "pypi:evals==3.0.1.post1/evals/registry/data/schelling_point/{}_5.jsonl"


@pytest.fixture(scope="session")
def teacher_tokenizer(embedded_gguf: Path) -> GgufTokenizer:
    return read_tokenizer(embedded_gguf, read_metadata(embedded_gguf)[0])


@pytest.fixture(scope="session")
def teacher_tokenizer_folder(teacher_tokenizer: GgufTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_tokenizer(teacher_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def passages() -> list[str]:
    """The original passages of the embedded data set."""
    found = []
    for name in ("owt", "wikipedia"):
        path = assets.fetch(AssetSpec(source=PASSAGES.format(name)), SilentProgress())
        found += [json.loads(line)["0"] for line in path.read_text().splitlines()]
    return found


def test_the_teacher_agrees_on_real_and_built_in_passages(
    teacher_tokenizer_folder: Path, embedded_gguf: Path, passages: list[str]
) -> None:
    assert len(passages) >= 1000 and len(probe_texts()) >= 1000
    result = compare(teacher_tokenizer_folder, embedded_gguf, passages + probe_texts(), probe_conversations())
    assert result.checked == len(passages) + len(probe_texts()) + len(probe_conversations())
    result.require("the teacher")


def test_a_plain_byte_level_pre_tokenizer_is_caught(
    teacher_tokenizer: GgufTokenizer, embedded_gguf: Path, passages: list[str], tmp_path: Path
) -> None:
    """What a converter gives that ignores `tokenizer.ggml.pre`: right on most passages, wrong on some."""
    write_tokenizer(dataclasses.replace(teacher_tokenizer, pre="gpt-2"), tmp_path)
    real = compare(tmp_path, embedded_gguf, passages)
    assert 0 < len(real.differences) < len(passages) / 10, "too few to notice by looking"
    with pytest.raises(IntegrityError, match=r"other token ids than in llama\.cpp") as caught:
        compare(tmp_path, embedded_gguf, probe_texts()).require("teacher.gguf")
    assert str(real.differences[0]).startswith(("'", '"')) and "at token" in str(caught.value)


def test_special_tokens_bos_and_template_follow_the_file(
    teacher_tokenizer_folder: Path, teacher_tokenizer: GgufTokenizer
) -> None:
    tokenizer = load_tokenizer(teacher_tokenizer_folder)
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == teacher_tokenizer.chat_template
    assert json.loads((teacher_tokenizer_folder / "tokenizer.gguf.json").read_text()) == {"pre": "smollm"}
    assert tokenizer("<|im_end|>")["input_ids"] == [2]


def toy_gguf(path: Path, pre: str) -> Path:
    """A GGUF with a vocabulary alone, merges learnt without any boundary between words, digits and spaces."""
    from gguf import GGUFWriter
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SEEDS, *SEEDS, *probe_texts(400)], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", sorted(pretokenizers.KNOWN))
def test_every_known_pre_tokenizer_splits_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    gguf = toy_gguf(tmp_path / "vocabulary.gguf", pre)
    metadata, elements = read_metadata(gguf)
    assert elements == 0
    write_tokenizer(read_tokenizer(gguf, metadata), tmp_path / "hf")
    compare(tmp_path / "hf", gguf, probe_texts()).require(pre)


def test_the_probes_tell_the_pre_tokenizers_apart(tmp_path: Path) -> None:
    """A test that could not fail would be none: with another family's split, ids differ."""
    families = {"gpt-2": "smollm", "smollm": "qwen2", "qwen2": "llama-bpe", "llama-bpe": "gpt-2"}
    for pre, other in families.items():
        gguf = toy_gguf(tmp_path / f"{pre}.gguf", pre)
        source = read_tokenizer(gguf, read_metadata(gguf)[0])
        write_tokenizer(dataclasses.replace(source, pre=other), tmp_path / pre)
        assert compare(tmp_path / pre, gguf, probe_texts()).differences


def test_a_wrong_bos_or_eos_is_a_difference(tmp_path: Path) -> None:
    gguf = toy_gguf(tmp_path / "vocabulary.gguf", "llama-bpe")
    source = read_tokenizer(gguf, read_metadata(gguf)[0])
    assert source.add_bos, "llama.cpp's default for this family, which the file does not spell out"
    write_tokenizer(dataclasses.replace(source, add_bos=False, eos_id=0), tmp_path / "hf")
    result = compare(tmp_path / "hf", gguf, ["x"])
    assert not result.differences and len(result.settings) == 2 and not result.equal


@pytest.mark.parametrize("pre", ["default", "gpt-5000"])
def test_an_unknown_pre_tokenizer_is_refused(pre: str) -> None:
    with pytest.raises(AssetError, match=f"'{pre}' is not known") as caught:
        pretokenizers.find(pre)
    assert "smollm" in str(caught.value) and "hf:" in str(caught.value)


def test_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(AssetError, match=r"broken\.gguf is not a readable GGUF"):
        read_metadata(path)
