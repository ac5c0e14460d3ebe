"""The llama.cpp runtime: bounded chunks change nothing, broken files are one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdistill.deployment.gguf_writer import write_gguf
from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
from lmdistill.errors import IntegrityError, LmdistillError


@pytest.fixture(scope="module")
def gguf(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_gguf(toy("lfm2"), path, "f32", name="toy", parent="0" * 64)
    return path


def test_chunks_carry_the_state_on(gguf: Path, sequences: list[list[int]]) -> None:
    """Logits are the same whether a sequence is read at once or by 16, and after another sequence."""
    tokens_T = sequences[1]
    with LlamaCppRuntime(gguf, n_ctx=256, n_batch=256, n_threads=1, exact=True) as runtime:
        whole_TV = runtime.logits(tokens_T)
        runtime.logits(sequences[0])
        assert np.array_equal(runtime.logits(tokens_T), whole_TV)
    with LlamaCppRuntime(gguf, n_ctx=256, n_batch=16, n_threads=1, exact=True) as runtime:
        chunks = list(runtime.logit_chunks(tokens_T))
    assert [start for start, _ in chunks] == list(range(0, len(tokens_T), 16))
    assert max(len(chunk_CV) for _, chunk_CV in chunks) == 16
    np.testing.assert_allclose(np.concatenate([chunk_CV for _, chunk_CV in chunks]), whole_TV, atol=1e-4)


def test_times_are_positive_and_lengths_are_checked(gguf: Path) -> None:
    with LlamaCppRuntime(gguf, n_ctx=64, n_threads=1) as runtime:
        assert runtime.prefill_seconds(32) > 0
        assert runtime.decode_seconds(8) > 0
        for ask in (runtime.prefill_seconds, runtime.decode_seconds):
            with pytest.raises(LmdistillError, match="65 tokens do not fit n_ctx=64"):
                ask(65)
        with pytest.raises(LmdistillError, match="65 tokens does not fit"):
            runtime.logits([1] * 65)
        with pytest.raises(LmdistillError, match="outside the vocabulary of 49152"):
            runtime.logits([1, 49152])
        assert runtime.logits([]).shape == (0, 49152)


@pytest.mark.parametrize("damage", ["cut", "junk", "empty", "absent"])
def test_a_broken_file_is_one_clear_error(damage: str, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    contents = {"cut": gguf.read_bytes()[:-100_000], "junk": b"junk" * 1000, "empty": b""}
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(LmdistillError, match=r"broken\.gguf") as caught:
        LlamaCppRuntime(path)
    assert isinstance(caught.value, IntegrityError) == (damage != "absent")


def test_numbers_that_are_not_finite_are_found_when_exact(gguf: Path, tmp_path: Path) -> None:
    """`exact` validates every tensor as it loads the file."""
    path = tmp_path / "nan.gguf"
    path.write_bytes(gguf.read_bytes()[:-64] + np.full(16, np.nan, np.float32).tobytes())
    with pytest.raises(IntegrityError, match="cannot load"):
        LlamaCppRuntime(path, exact=True)
