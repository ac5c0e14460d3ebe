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
        if (kind, seed) not in made:
            folder, toy = tmp_path_factory.mktemp(f"gguf-{kind}"), toy_llama(seed, num_hidden_layers=2)
            gguf = write_toy_gguf(toy, folder, kind)
            made[kind, seed] = ModelRef(f"toy-{kind}", read_back(gguf, toy, kind), f"{seed}" * 64, str(gguf), gguf)
        return made[kind, seed]

    return make


def write_toy_gguf(toy: Path, folder: Path, kind: str) -> Path:
    """`toy` as a GGUF file of type `kind` in `folder`."""
    from lmdistill.deployment.formats import FORMATS
    from lmdistill.deployment.gguf_writer import write_gguf
    from lmdistill.deployment.quantizer import quantize

    gguf = folder / f"{kind}.gguf"
    if kind in ("f32", "f16"):
        write_gguf(toy, gguf, kind, name="toy", parent="0" * 64)
    else:
        quantize(write_toy_gguf(toy, folder, "f32"), gguf, FORMATS[kind], threads=1)
    return gguf


def read_back(gguf: Path, toy: Path, kind: str) -> Path:
    """The weights that the file holds as a model folder: imported where they are quantised, else what is known."""
    from lmdistill.checkpoints import load_model, save_model
    from lmdistill.pipeline.stage import SilentProgress
    from lmdistill.teachers.gguf_import import import_gguf

    if kind == "f32":
        return toy
    folder = gguf.with_suffix("")
    if kind == "f16":
        save_model(load_model(toy).half().float(), folder, toy)
    else:
        import_gguf(gguf, folder, SilentProgress())
    return folder
