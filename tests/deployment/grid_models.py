"""Models that lie on a grid, as training on it would leave them."""

from __future__ import annotations

from pathlib import Path

from placed import place
from safetensors.torch import load_file, save_file

from lmdistill.checkpoints import copy_tokenizer
from lmdistill.deployment.gguf_writer import read_config
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.wanted import wanted


def on_grid(model: Path, folder: Path, keys: QuantizeKeys) -> Path:
    """`model` placed on the grid of `keys` in `folder`."""
    folder.mkdir()
    points, placement = place(load_file(model / "model.safetensors"), wanted(keys, read_config(model)))
    save_file(points, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    copy_tokenizer(model, folder)
    placement.save(folder)
    return folder
