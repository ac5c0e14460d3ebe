"""Fixtures for teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from teachers_toys import VOCAB, save_toy

from lmdistill.pipeline.stage import ModelRef


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A tiny Llama whose head has ten rows of padding."""
    return save_toy(tmp_path_factory.mktemp("toy"), rows=VOCAB + 10)


@pytest.fixture(scope="session")
def gguf_toy(toy_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelRef]:
    """A factory of toy teachers imported from a GGUF of a file type, as the asset layer would."""
    made: dict[tuple[str, int], ModelRef] = {}

    def make(kind: str, seed: int = 0) -> ModelRef:
        from lmdistill.deployment.formats import FORMATS
        from lmdistill.deployment.gguf_writer import write_gguf
        from lmdistill.deployment.quantizer import quantize
        from lmdistill.pipeline.stage import SilentProgress
        from lmdistill.teachers.gguf_import import import_gguf

        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"gguf-{kind}")
            gguf, whole = folder / f"{kind}.gguf", kind if kind in ("f32", "f16") else "f32"
            toy = toy_llama(seed, num_hidden_layers=2)
            write_gguf(toy, folder / f"{whole}.gguf", whole, name="toy", parent="0" * 64)
            if kind != whole:
                quantize(folder / f"{whole}.gguf", gguf, FORMATS[kind], threads=1)
            import_gguf(gguf, folder / "model", SilentProgress())
            made[kind, seed] = ModelRef(f"toy-{kind}", folder / "model", f"{seed}" * 64, str(gguf), gguf)
        return made[kind, seed]

    return make
