"""The decoder that is lowered computes what transformers computes, in calls of any length, on every architecture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdistill.checkpoints import load_model
from lmdistill.deployment.architectures import ARCHITECTURES
from lmdistill.deployment.executorch.layouts import LAYOUTS, architecture_for_pte
from lmdistill.deployment.executorch.nibbles import from_high_first, from_low_first, high_first, low_first
from lmdistill.deployment.executorch.places import quantised_places
from lmdistill.deployment.executorch.program import build_decoder
from lmdistill.deployment.gguf_writer import read_config
from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.quantization.placement import Placement

CONTEXT = 192
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("llama", {}),
    "llama, untied, biased, llama3's rope": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "lfm2": ("lfm2", {}),
    "lfm2 with four taps": ("lfm2", {"conv_L_cache": 4}),
    "lfm2 without convolution": ("lfm2", {"layer_types": ["full_attention"] * 3}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


def decoder_of(folder: Path) -> Any:
    names = ARCHITECTURES[read_config(folder)["model_type"]](read_config(folder)).tensors()
    return build_decoder(folder, Placement(dict.fromkeys(names, "f32")), CONTEXT)


def call(decoder: Any, ids: list[int], start: int, wanted: list[int] | None = None) -> torch.Tensor:
    positions = torch.arange(start, start + len(ids))
    mask = torch.where(torch.arange(start + len(ids))[None] <= positions[:, None], 0.0, -1e9)
    rows = torch.arange(len(ids)) if wanted is None else torch.tensor(wanted)
    with torch.inference_mode():
        return decoder(torch.tensor(ids), positions, mask, rows)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_computes_what_transformers_computes(case: str, toy: Any, sequences: Any) -> None:
    """Prompt, some more, single tokens; then another sequence in the same caches."""
    model_type, keys = CASES[case]
    folder = toy(model_type, **keys)
    decoder, model = decoder_of(folder), load_model(folder)
    for ids in sequences:
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0]
        cuts = [0, 17, 18, 19, 40, len(ids)]
        found = torch.cat([call(decoder, ids[a:b], a) for a, b in itertools.pairwise(cuts)])
        assert float((found - expected).abs().max()) < 1e-4
        some = call(decoder, ids[:20], 0, [19, 3])
        assert torch.allclose(some, call(decoder, ids[:20], 0)[[19, 3]], atol=1e-5)


def test_what_an_earlier_sequence_left_does_not_count(toy: Any, sequences: Any) -> None:
    """Not even numbers that are none: a fresh program's caches hold whatever memory held."""
    decoder = decoder_of(toy("lfm2"))
    before = call(decoder, sequences[0][:30], 0)
    for buffer in (one for name, one in decoder.named_buffers() if name.endswith(("keys", "values", "state"))):
        buffer.fill_(float("nan"))
    assert torch.equal(call(decoder, sequences[0][:30], 0), before)


def test_every_architecture_that_is_written_as_gguf_is_lowered_too() -> None:
    assert set(LAYOUTS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model_type": "lfm3"}, "'lfm3' to ExecuTorch; did you mean 'lfm2'"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is on"),
        ({"model_type": "lfm2", "conv_bias": True}, "conv_bias is on"),
        ({"model_type": "lfm2", "layer_types": ["conv", "mamba"]}, "layer type 'mamba'"),
    ],
)
def test_what_the_decoder_has_not_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(PreflightError, match=reason):
        architecture_for_pte({"num_hidden_layers": 2} | keys)


def test_widths_that_no_group_fits_are_refused(toy: Any) -> None:
    config = read_config(toy("lfm2")) | {"hidden_size": 48, "num_attention_heads": 4}
    with pytest.raises(PreflightError, match="rows of 48 weights cannot be put on grid '8da4w'"):
        quantised_places("pte_8da4w", architecture_for_pte(config))


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(toy: Any, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(toy("lfm2"), tmp_path / "model"))
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(IntegrityError, match="do not fit its config"):
        decoder_of(folder)


def test_codes_come_back_from_both_orders_of_nibbles() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 4)
    assert torch.equal(from_low_first(low_first(codes)), codes)
    assert torch.equal(from_high_first(high_first(codes)), codes)
    assert low_first(codes)[0, 0] == 0x10 and high_first(codes)[0, 0] == 0x01  # −8 and −7
