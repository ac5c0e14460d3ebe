"""The vocabulary in a GGUF is the tokenizer's, the template renders alike, and unknown kinds are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdistill.checkpoints import load_tokenizer
from lmdistill.deployment.gguf_writer import write_gguf
from lmdistill.deployment.golden import accepted_conversations, golden_conversations
from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
from lmdistill.deployment.template_parity import differing_renderings
from lmdistill.deployment.tokenizer_proof import prove_tokenizer
from lmdistill.deployment.vocabulary import PRE_TOKENIZER_FILE, check_tokenizer, read_vocabulary, turn_end
from lmdistill.errors import IntegrityError, PreflightError

Edit = Callable[[dict[str, Any]], object]
LLAMA3_SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
        " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.fixture
def edited(smollm_tokenizer_folder: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """The real tokenizer with its tokenizer.json edited, and no record of llama.cpp's name for it."""

    def make(edit: Edit) -> Path:
        folder = Path(shutil.copytree(smollm_tokenizer_folder, tmp_path / "tokenizer"))
        (folder / PRE_TOKENIZER_FILE).unlink(missing_ok=True)
        content = json.loads((folder / "tokenizer.json").read_text())
        edit(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="module")
def gguf(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy's folder and file."""
    folder, path = toy("llama"), tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_gguf(folder, path, "f16", name="toy", parent="0" * 64)
    return folder, path


def test_tokenizer_and_template_are_proven(gguf: tuple[Path, Path]) -> None:
    """1,200 texts and 48 conversations: no other id, no other rendering."""
    assert prove_tokenizer(*gguf, conversations=48, corpus=None) == {"texts": 1200, "conversations": 48, "differing": 0}


def test_generation_stops_at_the_turn_s_end(gguf: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(gguf[0])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer) == end
    with LlamaCppRuntime(gguf[1], n_ctx=32, n_threads=1) as runtime:
        assert runtime.special_ids == {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "eot": end}
        assert runtime.ends_generation(end)
        assert runtime.tokenize("x", add_special=True) == tokenizer("x")["input_ids"]
        assert runtime.chat_template == tokenizer.chat_template


def test_another_template_is_found_out(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    """One character in the checkpoint's template, after the file was written."""
    folder = Path(shutil.copytree(gguf[0], tmp_path / "model"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant: \n"))
    conversations = golden_conversations(6)
    assert differing_renderings(load_tokenizer(folder), gguf[1], conversations) == 6  # those with a prompt
    with pytest.raises(IntegrityError, match=r"the chat template in toy\.gguf is not the checkpoint's"):
        prove_tokenizer(folder, gguf[1], conversations=6, corpus=None)


def test_another_pre_tokenizer_is_found_out(toy: Any, tmp_path: Path) -> None:
    """The trap of SmolLM2: digits kept together give other ids for a few texts."""
    folder = Path(shutil.copytree(toy("llama"), tmp_path / "model"))
    (folder / PRE_TOKENIZER_FILE).write_text('{"pre": "gpt-2"}')
    write_gguf(folder, tmp_path / "x.gguf", "f16", name="toy", parent="0" * 64)
    with pytest.raises(IntegrityError, match="texts get other token ids"):
        prove_tokenizer(folder, tmp_path / "x.gguf", conversations=6, corpus=None)


def test_unused_rows_of_the_embedding_are_filled(smollm_tokenizer_folder: Path) -> None:
    vocabulary = read_vocabulary(smollm_tokenizer_folder, 49160)
    assert vocabulary.tokens[-1] == "[PAD49159]"
    assert vocabulary.kinds[-8:] == [5] * 8
    assert vocabulary.kinds[:17] == [3] * 17  # SmolLM2's special tokens
    assert set(vocabulary.kinds[17:-8]) == {1}
    with pytest.raises(PreflightError, match="ids up to 49151, the model's vocabulary is 49000"):
        read_vocabulary(smollm_tokenizer_folder, 49000)


def test_the_pre_tokenizer_s_name_is_deduced(edited: Callable[[Edit], Path]) -> None:
    """Without a record the structure decides: single digits are smollm's."""
    assert check_tokenizer(edited(lambda content: None)) == "smollm"


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        ({"type": "Sequence", "pretokenizers": [LLAMA3_SPLIT, BYTES_ONLY]}, True, "llama3"),
        ({**BYTES_ONLY, "use_regex": True}, False, "gpt-2"),
    ],
)
def test_other_known_pre_tokenizers(
    pre_tokenizer: dict[str, Any], ignore_merges: bool, name: str, edited: Callable[[Edit], Path]
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = pre_tokenizer
        content["model"]["ignore_merges"] = ignore_merges

    assert check_tokenizer(edited(edit)) == name


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda c: c["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda c: c["model"].update(byte_fallback=True), "BPE with byte fallback"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), r"normalises text \(Lowercase\)"),
        (lambda c: c["added_tokens"][1].update(rstrip=True), "swallows spaces"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "no known name in llama.cpp"),
        (
            lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [LLAMA3_SPLIT, BYTES_ONLY]}),
            "no known name in llama.cpp",  # llama3's pattern without its ignore_merges
        ),
    ],
)
def test_unknown_tokenizers_are_refused(edit: Edit, reason: str, edited: Callable[[Edit], Path]) -> None:
    with pytest.raises(PreflightError, match=reason):
        check_tokenizer(edited(edit))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"tokenizer\.json is missing"):
        check_tokenizer(tmp_path)


def test_golden_conversations_cover_what_they_promise(smollm_tokenizer_folder: Path) -> None:
    """Always the same, prefix-stable, with system prompts, several turns, digits, other scripts and code."""
    conversations = golden_conversations(64)
    assert conversations == golden_conversations(64)
    assert conversations[:10] == golden_conversations(10)
    roles = [[message["role"] for message in messages] for messages in conversations]
    assert sum(order[0] == "system" for order in roles) == 22
    assert {order[-1] for order in roles} == {"user", "assistant"}
    assert max(map(len, roles)) >= 6
    text = "".join(message["content"] for messages in conversations for message in messages)
    assert all(sign in text for sign in ("1984", "你好", "def f(x", "🙂", "مرحبا", "\r\n", "\t"))
    assert accepted_conversations(load_tokenizer(smollm_tokenizer_folder), 8) == golden_conversations(8)
