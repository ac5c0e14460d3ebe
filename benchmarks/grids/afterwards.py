"""Parents of benchmarks/quantize.py on a grid without training: as llama.cpp quantises them, and where training begins.

`python benchmarks/quantize.py` puts these figures beside those of training.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from grids.measured import measured
from grids.parent import Figures, Parent, Piece
from grids.ways import COMPENSATING, IMATRIX_TOKENS, Way
from lmdistill.checkpoints import load_model, save_model
from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.gguf_writer import write_gguf
from lmdistill.deployment.imatrix import importance_of
from lmdistill.deployment.quantizer import quantize
from lmdistill.evaluation.runtimes.checkpoint import CheckpointRuntime
from lmdistill.evaluation.runtimes.llama_cpp import GgufRuntime
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.on_grid import handle_of
from lmdistill.quantization.start import put_on_grids
from lmdistill.quantization.wanted import wanted
from lmdistill.training.on_grids import START


def untrained(parent: Parent, way: Way) -> dict[str, Piece]:
    """What the parent is on its grid before any step, in order of its cost."""
    scoring = parent.forward_seconds(parent.tokens)
    measuring = parent.forward_seconds(IMATRIX_TOKENS)
    if way.preset in FORMATS:
        made = {
            "ptq": Piece(f"{way.name}/ptq", partial(_file, parent, way, imatrix=False), 10 + scoring),
            "ptq_imatrix": Piece(
                f"{way.name}/ptq_imatrix", partial(_file, parent, way, imatrix=True), 10 + scoring + measuring
            ),
        }
    else:
        made = {
            name: Piece(
                f"{way.name}/{name}", partial(_model, parent, way, keys), scoring + measuring * (name != "ptq") + 5
            )
            for name, keys in way.untrained.items()
        }
    start = partial(_start, parent, way)
    compensating = COMPENSATING * parent.weights if way.keys.get("start") == "compensated" else 0
    return made | {"start": Piece(f"{way.name}/start", start, scoring + measuring + compensating)}


def _file(parent: Parent, way: Way, imatrix: bool) -> Figures:
    """llama.cpp's own quantisation of the parent, as a file in llama.cpp."""
    base = parent.work / "base-F32.gguf"
    if not base.exists():
        write_gguf(parent.folder, base.with_suffix(".tmp"), "f32", name=parent.name, parent="0" * 64)
        base.with_suffix(".tmp").replace(base)
    importance = importance_of(parent.folder, parent.training_text) if imatrix else None
    target = parent.file(way, "imatrix" if imatrix else "plain")
    quantize(base, target, FORMATS[way.preset], importance=importance)
    figures = parent.scored(GgufRuntime.open(target, parent.options, exact=True))
    target.unlink()
    return figures


def _model(parent: Parent, way: Way, keys: QuantizeKeys) -> Figures:
    """The parent on its grid without training, in transformers."""
    return parent.scored(CheckpointRuntime(_placed(parent, way, keys, None), "cpu"))


def _start(parent: Parent, way: Way) -> Figures:
    """Where training begins, measured as what it ends in is; what it took to find is kept for the training."""
    model, folder = _placed(parent, way, way.quantize, parent.work / way.name / START), parent.work / way.name / "begun"
    handle = handle_of(model)
    assert handle is not None
    placement = handle.settle()
    save_model(model, folder, tokenizer_from=parent.folder)
    placement.save(folder)
    figures = measured(parent, way, folder)
    shutil.rmtree(folder)
    return figures


def _placed(parent: Parent, way: Way, keys: QuantizeKeys, kept: Path | None) -> Any:
    """The parent on its grid; what that took to find goes to `kept`."""
    import torch

    model = load_model(parent.folder)
    config = json.loads((parent.folder / "config.json").read_text())
    rows = (torch.tensor([row]) for row in parent.training_text)
    if keys.start != "reference":
        length = len(parent.training_text[0])
        rows = (torch.tensor([row]) for row in parent.training_text[: -(-keys.start_tokens // length)])
    put_on_grids(model, keys, wanted(keys, config), rows, kept)
    return model
