"""Models on grids: presets are llama.cpp's, a placed model packs to llama.cpp's file, the proof notices a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from placed import place
from safetensors.torch import load_file, save_file

from lmdistill.checkpoints import copy_tokenizer
from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.formats import FORMATS
from lmdistill.deployment.gguf_header import read_tensors
from lmdistill.deployment.gguf_writer import read_config, write_gguf
from lmdistill.deployment.packed_gguf import verify_packed, write_packed_gguf
from lmdistill.deployment.quantizer import quantize
from lmdistill.errors import IntegrityError, RecipeError
from lmdistill.quantization.placement import Placement
from lmdistill.quantization.plan import PRESETS, grids_of_preset, tied_conflict

NAMES = {"name": "toy", "parent": "0" * 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 256 wide": ("llama", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9}),
    "llama, head apart": ("llama", {"intermediate_size": 256, "tie_word_embeddings": False}),
    "lfm2, 64 wide": ("lfm2", {}),
    "lfm2, no block fits": ("lfm2", {"hidden_size": 48, "intermediate_size": 96}),
}
PACKED = [(label, "q4_k_m") for label in MODELS if label != "lfm2, no block fits"] + [("lfm2, 64 wide", "q4_0")]
PAIRS = [(label, "q4_k_m") for label in MODELS] + [
    ("lfm2, 64 wide", preset) for preset in PRESETS if preset != "q4_k_m"
]


@pytest.fixture(scope="module")
def llama_cpp_file(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A factory of files that llama.cpp quantised from a toy model's float32 file."""
    folder = tmp_path_factory.mktemp("quantised")

    def make(label: str, preset: str) -> Path:
        source, target = folder / f"{label}.gguf", folder / f"{label}-{preset}.gguf"
        if not source.exists():
            write_gguf(_model(toy, label), source, "f32", **NAMES)
        quantize(source, target, FORMATS[preset], threads=1)
        return target

    return make


def _model(toy: Any, label: str) -> Path:
    kind, keys = MODELS[label]
    folder: Path = toy(kind, **keys)
    return folder


def _placed(model: Path, preset: str, folder: Path) -> Placement:
    """The model's points on a preset's grids, saved in `folder`."""
    grids = grids_of_preset(preset, architecture_of(read_config(model)))
    tensors = {name: weights for name, weights in load_file(model / "model.safetensors").items() if name in grids}
    points, placement = place(tensors, grids)
    save_file(points, folder / "model.safetensors")
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    copy_tokenizer(model, folder)
    return placement


def _stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor of a file."""
    whole = path.read_bytes()
    return {name: (t.type, whole[t.offset : t.offset + t.bytes]) for name, t in read_tensors(path).items()}


@pytest.mark.parametrize(("label", "preset"), PAIRS)
def test_a_preset_gives_each_tensor_the_type_llama_cpp_gives_it(
    label: str, preset: str, toy: Any, llama_cpp_file: Any
) -> None:
    architecture = architecture_of(read_config(_model(toy, label)))
    names = architecture.gguf_names()
    found = {names[source]: kind for source, kind in grids_of_preset(preset, architecture).items()}
    assert found == {name: info.type for name, info in read_tensors(llama_cpp_file(label, preset)).items()}


@pytest.mark.parametrize(("label", "preset"), PACKED)
def test_a_placed_model_packs_to_the_tensors_of_llama_cpps_file(
    label: str, preset: str, toy: Any, llama_cpp_file: Any, tmp_path: Path
) -> None:
    """Its points, packed with their scales, are the bytes that llama.cpp makes of the model before it was placed."""
    model = tmp_path / "model"
    model.mkdir()
    _placed(_model(toy, label), preset, model).save(model)
    placement = Placement.load(model)
    assert placement is not None
    write_packed_gguf(model, tmp_path / "packed.gguf", placement, preset, **NAMES)
    expected, found = _stored(llama_cpp_file(label, preset)), _stored(tmp_path / "packed.gguf")
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert verify_packed(tmp_path / "packed.gguf", model) == len(expected)


@pytest.fixture
def placed(toy: Any, tmp_path: Path) -> tuple[Path, Placement]:
    """A small model on the grids of Q4_0."""
    model = tmp_path / "model"
    model.mkdir()
    return model, _placed(_model(toy, "lfm2, 64 wide"), "q4_0", model)


def _scaled(model: Path, tensor: str, factor: float) -> None:
    tensors = load_file(model / "model.safetensors")
    flat = tensors[tensor].view(-1)
    flat[flat.abs().argmax()] *= factor
    save_file(tensors, model / "model.safetensors")


W1 = "model.layers.1.feed_forward.w1.weight"


def test_a_weight_off_its_grid_is_refused_by_name(placed: tuple[Path, Placement], tmp_path: Path) -> None:
    model, placement = placed
    _scaled(model, W1, 1.01)
    with pytest.raises(IntegrityError, match=rf"1 of the 8192 weights of {W1} do not lie on grid 'q4_0'"):
        write_packed_gguf(model, tmp_path / "x.gguf", placement, "q4_0", **NAMES)


def test_the_proof_notices_one_weight_that_differs(placed: tuple[Path, Placement], tmp_path: Path) -> None:
    model, placement = placed
    write_packed_gguf(model, tmp_path / "x.gguf", placement, "q4_0", **NAMES)
    _scaled(model, W1, -1.0)
    with pytest.raises(IntegrityError, match=f"1 of the 8192 weights of {W1} differ"):
        verify_packed(tmp_path / "x.gguf", model)


def test_learned_scales_are_packed_as_they_are(placed: tuple[Path, Placement], tmp_path: Path) -> None:
    """Scales that no quantiser would find: the file holds them, and the weights on them."""
    from lmdistill.quantization.registry import get

    model, placement = placed
    tensors = load_file(model / "model.safetensors")
    own = {"d": placement.scales[W1]["d"] * 1.2}
    tensors[W1] = get("q4_0").fake_quantise(tensors[W1], own)
    save_file(tensors, model / "model.safetensors")
    assert not torch.equal(get("q4_0").fake_quantise(tensors[W1]), tensors[W1])
    learned = Placement(placement.grids, placement.scales | {W1: own})
    write_packed_gguf(model, tmp_path / "x.gguf", learned, "q4_0", **NAMES)
    assert verify_packed(tmp_path / "x.gguf", model) == len(placement.grids)


def test_placements_that_no_gguf_can_hold_are_told(placed: tuple[Path, Placement], tmp_path: Path) -> None:
    model, placement = placed
    with pytest.raises(IntegrityError, match="cannot hold grid '8da4w'"):
        write_packed_gguf(model, tmp_path / "x", Placement(placement.grids | {W1: "8da4w"}), "q4_0", **NAMES)
    some = {name: kind for name, kind in placement.grids.items() if name != W1}
    with pytest.raises(IntegrityError, match=f"no grid, the first is {W1}"):
        write_packed_gguf(model, tmp_path / "x", Placement(some), "q4_0", **NAMES)
    assert Placement.load(model) is None
    placement.save(model)
    (model / "grids" / "grids.json").write_text('{"version": 9}')
    with pytest.raises(IntegrityError, match="version 9"):
        Placement.load(model)


def test_unknown_presets_and_unequal_tied_grids_are_told(toy: Any) -> None:
    tied, apart = (architecture_of(read_config(_model(toy, label))) for label in list(MODELS)[:2])
    with pytest.raises(RecipeError, match="did you mean 'q4_k_m'"):
        grids_of_preset("q4_k_s", tied)
    grids = {"lm_head.weight": "q6_k", "model.embed_tokens.weight": "q4_0"}
    assert "one tied matrix" in tied_conflict(grids, tied)
    assert tied_conflict(grids, apart) == tied_conflict(grids_of_preset("q4_0", tied), tied) == ""
