"""A GGUF written by lmdistill computes what the checkpoint computes, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmdistill.deployment.architectures import architecture_of, check_model_type
from lmdistill.deployment.gguf_header import read_tensors
from lmdistill.deployment.gguf_writer import read_config, write_gguf
from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
from lmdistill.deployment.parity import measure_parity, write_reference
from lmdistill.deployment.targets.gguf import GgufTarget
from lmdistill.errors import IntegrityError, PreflightError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, wide heads, biases, own head": (
        "llama",
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "lfm2": ("lfm2", {}),
    "lfm2, attention first, own head": (
        "lfm2",
        {"layer_types": ["full_attention", "full_attention", "conv"], "tie_word_embeddings": False},
    ),
    "lfm2, adjusted width, four taps": (
        "lfm2",
        {"block_auto_adjust_ff_dim": True, "block_multiple_of": 32, "conv_L_cache": 4},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("case", MODELS)
def test_file_computes_what_the_checkpoint_computes(case: str, toy: Any, sequences: Any, tmp_path: Path) -> None:
    """f32: mean KL below 1e-9; f16 (tried on two): below 2e-5; the file holds the model's weights, each once."""
    model_type, keys = MODELS[case]
    folder = toy(model_type, **keys)
    write_reference(folder, sequences, tmp_path / "reference", 1)
    for precision, bound in {"f32": 1e-9, "f16": 2e-5}.items() if case in ("llama", "lfm2") else [("f32", 1e-9)]:
        path = tmp_path / f"{precision}.gguf"
        write_gguf(folder, path, precision, name="toy", parent="0" * 64)  # type: ignore[arg-type]
        with GgufTarget().opened(path, max(map(len, sequences)), 1) as source:
            parity = measure_parity(source, path.name, sequences, tmp_path / "reference")
        assert parity.mean_kl < bound, (case, precision, parity)
        assert parity.tokens == sum(map(len, sequences))
    weights = sum(tensor.weights for name, tensor in read_tensors(path).items() if name != "rope_freqs.weight")
    assert weights == _parameters(folder)


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118


def test_llama_cpp_counts_the_same_parameters(toy: Any, tmp_path: Path) -> None:
    """A tied head is in the file once."""
    folder = toy("lfm2")
    write_gguf(folder, tmp_path / "x.gguf", "f32", name="toy", parent="0" * 64)
    with LlamaCppRuntime(tmp_path / "x.gguf", n_ctx=32, n_threads=1) as runtime:
        assert runtime.n_params == _parameters(folder)
    assert "output.weight" not in read_tensors(tmp_path / "x.gguf")


def test_norms_and_taps_stay_32_bit(toy: Any, tmp_path: Path) -> None:
    write_gguf(toy("lfm2"), tmp_path / "x.gguf", "f16", name="toy", parent="0" * 64)
    types = {name: tensor.type for name, tensor in read_tensors(tmp_path / "x.gguf").items()}
    wide = {name for name, type_ in types.items() if type_ == "f32"}
    assert wide == {name for name in types if "norm" in name or "shortconv.conv" in name}
    assert len(wide) == 3 * 2 + 2 + 2 + 1  # two norms a layer, q and k norm, taps of two layers, the last norm


def test_same_bytes_twice(toy: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(toy("llama"), tmp_path / name, "f16", name="toy", parent="0" * 64)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unknown_architecture_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PreflightError, match=r"'lfm3'; did you mean 'lfm2'\?"):
        check_model_type("lfm3")
    with pytest.raises(PreflightError, match="lmdistill writes lfm2, llama, qwen2, qwen3"):
        architecture_of({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("lfm2", {"conv_bias": True}, "conv_bias is on"),
        ("lfm2", {"layer_types": ["conv"] * 3}, "no layer is full_attention"),
        ("lfm2", {"layer_types": ["full_attention"] * 3}, "no layer is conv"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is on"),
        ("qwen3", {"attention_bias": True}, "attention_bias is on"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    model_type: str, keys: dict[str, Any], reason: str, toy: Any
) -> None:
    config = read_config(toy(model_type)) | keys
    with pytest.raises(PreflightError, match=reason):
        architecture_of(config)


def test_weights_that_do_not_fit_the_config_are_refused(toy: Any, tmp_path: Path) -> None:
    """A layer more in config.json than in the weights."""
    folder = Path(shutil.copytree(toy("llama"), tmp_path / "model"))
    config = read_config(folder) | {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=r"model\.layers\.3\.input_layernorm\.weight is missing"):
        write_gguf(folder, tmp_path / "x.gguf", "f32", name="toy", parent="0" * 64)


@pytest.mark.parametrize(("value", "reason"), [(1e6, "does not fit f16"), (float("nan"), "not finite")])
def test_numbers_that_f16_cannot_hold_are_refused(value: float, reason: str, toy: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(toy("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=reason):
        write_gguf(folder, tmp_path / "x.gguf", "f16", name="toy", parent="0" * 64)
