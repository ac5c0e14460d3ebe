"""Variants of the teacher cache: the table of them, and mmap's bytes as they have always been."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from signals_synthetic import BigramEngine, capture, random_rows, write_cache, write_corpus

from lmdistill.errors import PreflightError, StageError
from lmdistill.signals import variant as variants

# numpy's exp and log round their last digit otherwise with AVX512 than without.
AVX512 = any(
    name.startswith("AVX512") or name == "X86_V4"
    for name in np.show_config(mode="dicts")["SIMD Extensions"].get("found", ())  # type: ignore[call-overload,index]
)
NARROW = (
    "e59e8fbfadf63aa581224bbc66859af5217012473b6373727ca260448de3cb5d"
    if AVX512
    else "d903dcc8ed7d9b6b0c413dae77ab8e6d923456ad8c8a1893f8c1c6df04022aad"
)
WIDE = (
    "8a060cde8081943a0b29233439d7ac057d58c232800dc60ca30c8d747c63efd6"
    if AVX512
    else "0530ac2d6da45f30e42384438acc4adee4a1a516a9d9a8f8c82b32b694486cbc"
)


def folder_digest(folder: Path) -> str:
    """One sha256 over all names and bytes."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def test_mmap_bytes_are_those_of_the_first_format_1_cache(tmp_path):
    """Shards, records and manifest of version 1: caches written then and now are interchangeable."""
    teacher = BigramEngine()
    write_corpus(tmp_path / "corpus", {"train": teacher.text(1, 22), "valid": teacher.text(2, 5)})
    capture(tmp_path / "corpus", tmp_path / "narrow", BigramEngine(), ("train", "valid")).run()
    assert folder_digest(tmp_path / "narrow") == NARROW
    write_cache(tmp_path / "wide", *random_rows(5, 6, 8, 70_000, 4), 70_000)
    assert folder_digest(tmp_path / "wide") == WIDE


def test_an_unknown_variant_is_told_the_nearest_name():
    """A slip of the pen in `variant:` is answered with what there is."""
    with pytest.raises(PreflightError, match=r"no variant 'mmpa'; did you mean 'mmap'\?(.|\n)*use one of: .*mmap"):
        variants.get("mmpa")


def test_an_engine_that_shifts_its_output_is_refused_before_a_byte_is_written(tmp_path):
    """The proof that readers make is made once by the writer: hours of capture cannot end in a useless cache."""
    teacher = BigramEngine()
    write_corpus(tmp_path / "corpus", {"train": teacher.text(1, 22)})

    class Shifted(BigramEngine):
        def score(self, tokens_BT, starts_BT):
            exact = super().score(tokens_BT, starts_BT)
            exact.ids_BTK[:] = exact.ids_BTK[:, ::-1].copy()
            return exact

    with pytest.raises(StageError, match=r"log-probs of row 0 do not belong to its tokens(.|\n)*position"):
        capture(tmp_path / "corpus", tmp_path / "out", Shifted()).run()
    assert not list((tmp_path / "out").glob("*.sig"))
