"""Quantisation: what falls back is foreseen exactly, threads change nothing, unknown names are told the nearest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.formats import FORMATS, actual_fallbacks, fallback_share, predicted_fallbacks
from lmdistill.deployment.gguf_header import bits_per_weight, read_tensors
from lmdistill.deployment.gguf_writer import read_config, write_gguf
from lmdistill.deployment.quantizer import quantize
from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.stages.export import ExportConfig

QUANTIZED = ("q8_0", "q4_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q6_k")
WIDTHS = {
    "64": {},
    "256": {"hidden_size": 256, "intermediate_size": 512},
    "mixed": {"intermediate_size": 256},
    "48": {"hidden_size": 48, "intermediate_size": 96},
}
_NOT_DIVISIBLE = re.compile(r"warning: (\S+)\s+- ncols")


@pytest.fixture(scope="module")
def files(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """F32 files of hybrids of several widths, with their architectures."""
    made = {}
    for width, keys in WIDTHS.items():
        folder = toy("lfm2", **keys)
        path = tmp_path_factory.mktemp("f32") / f"{width}.gguf"
        write_gguf(folder, path, "f32", name="toy", parent="0" * 64)
        made[width] = (path, architecture_of(read_config(folder)))
    return made


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_fallbacks_are_foreseen(name: str, width: str, files: Any, tmp_path: Path) -> None:
    """The prediction equals what llama.cpp did, by the file's types and by its own warnings (the head aside)."""
    source, architecture = files[width]
    predicted = predicted_fallbacks(FORMATS[name], architecture)
    log = quantize(source, tmp_path / "q.gguf", FORMATS[name], threads=1)
    tensors = read_tensors(tmp_path / "q.gguf")
    assert sorted(predicted) == actual_fallbacks(FORMATS[name], architecture, tensors)
    warned = {match[1] for line in log if (match := _NOT_DIVISIBLE.search(line))}
    assert warned - {"token_embd.weight"} == set(predicted) - {"token_embd.weight"}
    if not predicted:
        assert bits_per_weight(tensors) < max(FORMATS[name].bits, 6.5625) + 0.1  # the tied head is Q6_K


def test_widths_decide_the_share(files: Any) -> None:
    for name in ("q4_0", "q4_k_m"):
        assert fallback_share(FORMATS[name], files["256"][1]) == 0
        assert fallback_share(FORMATS[name], files["64"][1]) > 0.9  # nearly all weights are embeddings here
    assert fallback_share(FORMATS["q8_0"], files["64"][1]) == 0
    assert fallback_share(FORMATS["f16"], files["64"][1]) == 0


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "bf16"])
def test_threads_do_not_change_the_bytes(name: str, files: Any, tmp_path: Path) -> None:
    for threads in (1, 2, 3):
        quantize(files["256"][0], tmp_path / str(threads), FORMATS[name], threads=threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes()


def test_header_agrees_with_the_gguf_package(files: Any) -> None:
    import gguf

    path = files["64"][0]
    expected = {
        tensor.name: (
            tuple(int(size) for size in tensor.shape[::-1]),
            tensor.tensor_type.name.lower(),
            tensor.n_bytes,
            tensor.data_offset,
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
    assert {name: (t.shape, t.type, t.bytes, t.offset) for name, t in read_tensors(path).items()} == expected


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"nope" * 20])
def test_header_of_what_is_no_gguf(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"cut short|not a GGUF"):
        read_tensors(tmp_path / "x")


def test_a_source_that_is_no_gguf_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nope" * 20)
    with pytest.raises(LmdistillError, match="could not make y"):
        quantize(tmp_path / "x", tmp_path / "y", FORMATS["q4_0"], threads=1)


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match=r"no format 'q4_k_x' \(there are f32, .*\); did you mean 'q4_k_"):
        ExportConfig(formats=("q4_k_x",))
    with pytest.raises(ValidationError, match="at least 1 item"):
        ExportConfig(formats=())
    assert ExportConfig(formats=("Q4_0", "q4_0", "F16")).formats == ("q4_0", "f16")
