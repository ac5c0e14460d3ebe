"""Export of models that lie on grids, and of full precision with an importance matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_models import on_grid
from safetensors.torch import load_file, save_file

from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.gguf_header import read_tensors
from lmdistill.deployment.gguf_writer import read_config, write_gguf
from lmdistill.deployment.imatrix import importance_of
from lmdistill.deployment.packed_gguf import verify_packed
from lmdistill.deployment.quantizer import quantize
from lmdistill.errors import IntegrityError
from lmdistill.pipeline.stage import Artefact, Planned, PreflightContext, Runtime, StageConfig, StageContext
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.stages.export import ExportConfig, ExportStage
from lmdistill.training.config import DistillConfig

STAGE = ExportStage()
W1 = "model.layers.1.feed_forward.w1.weight"


def _artefact(model: Path, folder: Path) -> Artefact:
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "model").symlink_to(model)
    return Artefact("qad", "distill", "model", "f" * 64, folder)


def _context(model: Artefact, folder: Path, corpus: Artefact | None = None, **keys: Any) -> StageContext[ExportConfig]:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    config = ExportConfig(**({"parity_tokens": 64, "golden_conversations": 2} | keys))
    inputs = {"model": [model]} | ({"corpus": [corpus]} if corpus else {})
    return StageContext("toy", config, inputs, None, folder / "out", folder / "work", runtime=Runtime(threads=1))


def test_a_model_on_its_grid_is_packed_and_every_weight_is_verified(toy: Any, tmp_path: Path) -> None:
    model = _artefact(on_grid(toy("lfm2"), tmp_path / "grid", QuantizeKeys(grid="q4_0")), tmp_path / "a")
    context = _context(model, tmp_path / "run", formats=("q4_0",))
    metrics = STAGE.run(context)
    STAGE.verify(context, metrics)
    [entry] = json.loads((context.out / "deployment.json").read_text())["files"]
    tensors = read_tensors(context.out / entry["file"])
    assert entry["bit_equal"] == len(tensors) and entry["note"] == "trained on its grid"
    assert tensors["blk.1.ffn_gate.weight"].type == "q4_0"
    assert not list(context.work.glob("*F32*"))  # no file in full precision, no second quantisation
    weights = load_file(model.out / "model/model.safetensors")
    weights[W1][0, 0] += 1
    save_file(weights, (model.out / "model").resolve() / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=f"1 of the 8192 weights of {W1} differ"):
        STAGE.verify(context, metrics)


def _planned(model: Artefact | None, config: StageConfig, up: Planned | None = None) -> Planned:
    return Planned("qad", "distill", "model", "f" * 64, config, {"student": [up]} if up else {}, model)


def _refusals(model: Planned, tmp_path: Path, **keys: Any) -> list[str]:
    context = PreflightContext("toy", ExportConfig(**keys), {"model": [model]}, None, tmp_path)
    return [str(problem) for problem in STAGE.preflight(context)]


def test_a_second_quantisation_is_refused_before_anything_runs(toy: Any, tmp_path: Path) -> None:
    trained = _planned(None, DistillConfig.model_validate({"quantize": {"grid": "q4_0"}}))
    later = _planned(None, DistillConfig(loss="ce"), trained)
    done = _artefact(on_grid(toy("lfm2"), tmp_path / "grid", QuantizeKeys(grid="q4_0")), tmp_path / "a")
    for model in (trained, later, _planned(done, DistillConfig())):
        [problem] = _refusals(model, tmp_path, formats=("f16", "q4_0", "q8_0"))
        assert "`formats: q8_0` would quantise a model a second time" in problem and "formats: [q4_0]" in problem
        assert _refusals(model, tmp_path, formats=("f16", "q4_0")) == []
    assert _refusals(_planned(None, DistillConfig()), tmp_path, formats=("q8_0",)) == []


def test_a_grid_that_no_gguf_holds_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = _planned(None, DistillConfig.model_validate({"quantize": {"grid": "8da4w"}}))
    [problem] = _refusals(model, tmp_path, formats=("q4_0",))
    assert "a GGUF file cannot hold a model trained on grid '8da4w'" in problem


def test_an_importance_matrix_needs_text(tmp_path: Path) -> None:
    [problem] = _refusals(_planned(None, DistillConfig()), tmp_path, imatrix_tokens=64)
    assert "`imatrix_tokens` needs a corpus" in problem


def test_the_importance_matrix_is_the_mean_square_of_what_reaches_a_layer(toy: Any, sequences: list[list[int]]) -> None:
    from lmdistill.checkpoints import load_model

    folder = toy("lfm2")
    found = importance_of(folder, sequences)
    names = architecture_of(read_config(folder)).gguf_names()
    assert "token_embd.weight" not in found
    seen: list[torch.Tensor] = []
    model = load_model(folder)
    model.model.layers[1].feed_forward.w1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    expected = torch.cat(seen).pow(2).mean(0)
    assert torch.allclose(torch.from_numpy(found[names[W1]]), expected, rtol=1e-5)
    expected_size = {"blk.1.ffn_down.weight": 128, "blk.1.attn_q.weight": 64, "blk.0.shortconv.in_proj.weight": 64}
    assert {name: found[name].size for name in expected_size} == expected_size


def test_with_an_importance_matrix_important_inputs_are_kept_better(toy: Any, tmp_path: Path) -> None:
    """llama.cpp itself reads it: the error of the inputs that matter falls, and untouched tensors stay."""
    import gguf

    model, names = toy("lfm2"), {"name": "toy", "parent": "0" * 64}
    write_gguf(model, tmp_path / "f32.gguf", "f32", **names)
    weight = load_file(model / "model.safetensors")[W1]
    square_D = np.full(weight.shape[1], 1e-4, np.float32)
    square_D[::8] = 1.0
    quantize(tmp_path / "f32.gguf", tmp_path / "plain.gguf", FORMATS["q4_0"], threads=1)
    importance = {"blk.1.ffn_gate.weight": square_D}
    quantize(tmp_path / "f32.gguf", tmp_path / "weighed.gguf", FORMATS["q4_0"], threads=1, importance=importance)
    errors, others = [], []
    for file in ("plain.gguf", "weighed.gguf"):
        tensors, data = read_tensors(tmp_path / file), (tmp_path / file).read_bytes()
        gate, other = (tensors[f"blk.{layer}.ffn_gate.weight"] for layer in (1, 2))
        blocks = np.frombuffer(data, np.uint8, gate.bytes, gate.offset).reshape(gate.shape[0], -1)
        found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
        errors.append(float(((found - weight.numpy()) ** 2)[:, ::8].mean()))
        others.append(data[other.offset : other.offset + other.bytes])
    assert errors[1] < 0.8 * errors[0]
    assert others[0] == others[1]


def test_the_record_names_the_importance_matrix_and_only_grids_have_one(
    toy: Any, corpus: Artefact, tmp_path: Path
) -> None:
    model = _artefact(toy("lfm2"), tmp_path / "a")
    files = {}
    for place_, keys in (("plain", {}), ("weighed", {"imatrix_tokens": 100})):
        context = _context(model, tmp_path / place_, corpus, formats=("f16", "q4_0"), parity_tokens=32, **keys)
        STAGE.verify(context, STAGE.run(context))
        files[place_] = {e["format"]: e for e in json.loads((context.out / "deployment.json").read_text())["files"]}
    assert files["weighed"]["q4_0"]["note"] == "imatrix of 100 tokens"
    assert files["weighed"]["q4_0"]["sha256"] != files["plain"]["q4_0"]["sha256"]
    assert files["weighed"]["f16"] == files["plain"]["f16"]
    assert "note" not in files["plain"]["q4_0"]


def test_a_q4_0_file_that_llama_cpp_quantised_is_not_the_trained_one(toy: Any, tmp_path: Path) -> None:
    """What the proof is for: a second quantisation moves learned scales, and `verify` says so."""
    keys = QuantizeKeys(grid="q4_0")
    model = on_grid(toy("lfm2"), tmp_path / "grid", keys)
    weights = load_file(model / "model.safetensors")
    from lmdistill.quantization.placement import Placement

    placement = Placement.load(model)
    assert placement is not None
    own = {"d": placement.scales[W1]["d"] * 1.2}  # no weight at -8 any more: llama.cpp takes another scale
    weights[W1] = placement.grid(W1).fake_quantise(weights[W1], own)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    write_gguf(model, tmp_path / "f32.gguf", "f32", name="toy", parent="0" * 64)
    quantize(tmp_path / "f32.gguf", tmp_path / "again.gguf", FORMATS["q4_0"], threads=1)
    with pytest.raises(IntegrityError, match=f"weights of {W1} differ"):
        verify_packed(tmp_path / "again.gguf", model)


def test_a_checkpoint_is_scored_as_it_was_trained(toy: Any, sequences: list[list[int]], tmp_path: Path) -> None:
    """On 8da4w with rounded activations, as its program computes; plain transformers has another model."""
    from lmdistill.checkpoints import load_model
    from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class
    from lmdistill.quantization.on_grid import kept_on_its_grids

    folder = on_grid(toy("lfm2"), tmp_path / "grid", QuantizeKeys(grid="8da4w"))
    tokens_T = np.array(sequences[0][:64])
    runtime = runtime_class("transformers").open(folder, RuntimeOptions(context=64, device="cpu"), exact=True)
    found_TV = torch.from_numpy(runtime.log_probs(tokens_T, 49152))
    expected = []
    for stays in (True, False):
        model = load_model(folder)
        if stays:
            kept_on_its_grids(model, folder)
        with torch.no_grad():
            expected.append(model(torch.from_numpy(tokens_T)[None]).logits[0].log_softmax(-1))
    assert torch.allclose(found_TV, expected[0], atol=1e-5)
    assert not torch.allclose(found_TV, expected[1], atol=1e-3)
