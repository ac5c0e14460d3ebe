"""Programs whose scales fit the inputs of their layers, as a GGUF's do with an importance matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import CorpusReader
from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.executorch.constants import verify_program
from lmdistill.deployment.executorch.places import quantised_places
from lmdistill.deployment.executorch.weighed import save_weighed
from lmdistill.deployment.export import Export
from lmdistill.deployment.gguf_writer import read_config
from lmdistill.errors import IntegrityError
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext
from lmdistill.quantization.importance import measure
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.registry import get
from lmdistill.stages.export import ExportConfig, ExportStage

W1, EMBEDDINGS = "model.layers.1.feed_forward.w1.weight", "model.embed_tokens.weight"
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}


@pytest.mark.parametrize("format_name", ["pte_8da4w", "pte_8da4w_all"])
def test_weighed_scales_lose_less_of_what_reaches_a_layer(
    toy: Any, sequences: list[list[int]], tmp_path: Path, format_name: str
) -> None:
    """The error in a layer's outputs, weighted as it is measured; and tensors lie where the plain format has them."""
    source = toy("lfm2", **TWO_LAYERS)
    placement = save_weighed(source, tmp_path / "weighed", format_name, sequences)
    assert placement.grids == quantised_places(format_name, architecture_of(read_config(source)))
    trained, weighed = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "weighed"))
    square_D = measure(load_model(source), (torch.tensor([ids]) for ids in sequences)).square(W1)
    grid = get("8da4w")
    plain = grid.dequantise(grid.quantise(trained[W1]))
    lost, before = (float(((points - trained[W1]).pow(2) * square_D).sum()) for points in (weighed[W1], plain))
    assert lost < 0.97 * before
    if format_name.endswith("_all"):
        reference = grid.quantise(trained[EMBEDDINGS]).scales["d"]
        assert torch.equal(placement.scales[EMBEDDINGS]["d"], reference)
    else:
        assert torch.equal(weighed[EMBEDDINGS], trained[EMBEDDINGS])


def test_a_program_is_made_with_an_importance_matrix(toy: Any, corpus: Artefact, tmp_path: Path) -> None:
    """The file has the weighed points and not the plain ones, its record names the text, no second model is left."""
    pytest.importorskip("executorch")
    source = toy("llama", num_hidden_layers=1)
    (tmp_path / "model/out").mkdir(parents=True)
    (tmp_path / "model/out/model").symlink_to(source)
    (tmp_path / "out").mkdir()
    config = ExportConfig(formats=("pte_8da4w_all",), imatrix_tokens=100, parity_tokens=64, context=128)
    parent = Artefact("student", "distill", "model", "f" * 64, tmp_path / "model")
    context = StageContext(
        "toy",
        config,
        {"model": [parent], "corpus": [corpus]},
        None,
        tmp_path / "out",
        tmp_path / "work",
        runtime=Runtime(threads=1),
    )
    ExportStage().verify(context, ExportStage().run(context))
    [entry] = json.loads((context.out / "deployment.json").read_text())["files"]
    assert entry["note"] == "imatrix of 100 tokens" and "bit_equal" not in entry
    assert 0 < entry["parity"]["mean_kl"] < 1 and entry["delegated"] >= 0.95
    assert not list(context.work.glob("*weighed*"))
    text = _export(corpus, context.out, context.work).imatrix_text()
    assert sum(map(len, text)) == 100
    weighed = save_weighed(source, tmp_path / "again", "pte_8da4w_all", text)
    verify_program(context.out / entry["file"], tmp_path / "again", weighed)
    plain = Placement(quantised_places("pte_8da4w_all", architecture_of(read_config(source))), preset="8da4w")
    with pytest.raises(IntegrityError):
        verify_program(context.out / entry["file"], source, plain)


def _export(corpus: Artefact, out: Path, work: Path) -> Export:
    model = ModelRef("student", out, "0" * 64)
    return Export(model, "toy", (), 0, 64, out, work, CorpusReader(corpus.out), imatrix_tokens=100)
