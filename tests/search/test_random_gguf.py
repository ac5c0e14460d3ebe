"""Random-weight files: tensor for tensor what the real export would write, and llama.cpp runs them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys.search_shapes import TOY, toy_space, toy_whole

from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.gguf_header import read_tensors
from lmdistill.deployment.gguf_writer import write_gguf
from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
from lmdistill.deployment.quantizer import quantize
from lmdistill.search.candidate import Candidate
from lmdistill.search.random_gguf import write_random_gguf
from lmdistill.search.sub_space import sub_spaces


def exported(candidate: Candidate, folder: Path, tokenizer_folder: Path, format_name: str) -> Path:
    """The file that the candidate's trained model would ship as."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lmdistill.checkpoints import save_model

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = candidate.config(LlamaConfig(**{**TOY, **special, "vocab_size": candidate.vocab_size}))
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config).float(), folder / "model", tokenizer_from=tokenizer_folder)
    write_gguf(folder / "model", folder / "f32.gguf", "f32", name="toy", parent="0")
    quantize(folder / "f32.gguf", folder / "real.gguf", FORMATS[format_name], threads=1)
    return folder / "real.gguf"


CASES = [
    ("q4_0", toy_whole().largest()),
    ("q4_0", toy_whole().sample(random.Random(1))),
    ("q4_0", sub_spaces(toy_space(operators=["attention"], attention_layers=None))[0].sample(random.Random(2))),
    ("q8_0", toy_whole().sample(random.Random(3))),
    ("q4_k_m", toy_whole().largest()),
]


@pytest.mark.parametrize(("format_name", "candidate"), CASES)
def test_a_random_file_has_the_tensors_and_types_of_the_exported_one(
    format_name: str, candidate: Candidate, tmp_path: Path, smollm_tokenizer_folder: Path
) -> None:
    candidate = replace(candidate, vocab_size=49152)  # the tokenizer's
    assert candidate.problems(format_name) == []
    real = read_tensors(exported(candidate, tmp_path, smollm_tokenizer_folder, format_name))
    written = write_random_gguf(candidate, tmp_path / "random.gguf", format_name)
    made_up = read_tensors(tmp_path / "random.gguf")
    assert written == (tmp_path / "random.gguf").stat().st_size
    assert {n: (t.shape, t.type, t.bytes) for n, t in made_up.items()} == {
        n: (t.shape, t.type, t.bytes) for n, t in real.items()
    }
    with LlamaCppRuntime(tmp_path / "random.gguf", n_ctx=64, n_threads=1, exact=True) as llama:
        logits = llama.logits([1, 2, 3, 4, 5])
        assert llama.n_params == candidate.parameters
    assert all(math.isfinite(value) for value in logits.ravel().tolist())
    assert logits.std() > 0


def test_the_same_candidate_gives_the_same_bytes(tmp_path: Path) -> None:
    candidate = toy_whole().largest()
    for name in "ab":
        write_random_gguf(candidate, tmp_path / name, "q4_0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
