"""A short convolution beside the attention of every block, each distilled by itself on what the teacher computes.

Starts as students/short_conv.py does, goes on as students/regression.py does, with the rest of the block as it is:
the block that convolves learns to give what the block that attends gives. Each is kept as soon as it is fitted.

Axes: R rows, T positions, D hidden width, C channels of a convolution.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Progress
from lmdistill.students import blocks, lfm2, regression, short_conv
from lmdistill.students.regression import Fit


@dataclass(frozen=True)
class Convolution:
    """A fitted operator, how important its channels are, and the block's relative error before and after."""

    module: Any  # Lfm2ShortConv
    channels_C: torch.Tensor
    errors: tuple[float, float]


def fit_convolutions(
    source: Any, tokens_RT: torch.Tensor, kernel: int, fit: Fit, work: Path, progress: Progress
) -> list[Convolution]:
    """One for each block of an all-attention Lfm2 model, on the hidden states that it has there itself."""
    layers = list(source.model.layers)
    config = lfm2.config_like(source.config, ["conv"] * len(layers), kernel, source.config.norm_eps)
    work.mkdir(parents=True, exist_ok=True)
    hidden_RTD = blocks.embed(source, tokens_RT).detach()
    rotary = blocks.positions(source, hidden_RTD[:1])
    found = []
    for place, block in enumerate(layers):
        targets_RTD = regression.advance(block, hidden_RTD, rotary, fit.rows, fit.precision)
        kept = work / f"conv-{place:03d}"
        if not kept.with_suffix(".json").exists():
            _fit_one(config, block, hidden_RTD, targets_RTD, rotary, fit, kept)
        found.append(_load(config, kept))
        hidden_RTD = targets_RTD
        progress.update(place + 1, len(layers), "convolutions fitted", error=round(found[-1].errors[1], 5))
    return found


def _fit_one(
    config: Any, block: Any, inputs_RTD: torch.Tensor, targets_RTD: torch.Tensor, rotary: Any, fit: Fit, kept: Path
) -> None:
    from transformers.models.lfm2.modeling_lfm2 import Lfm2DecoderLayer

    stand_in = Lfm2DecoderLayer(config, 0).float().to(inputs_RTD.device).eval()
    stand_in.load_state_dict(block.state_dict(), strict=False)
    with torch.no_grad():
        normed_RTD = block.operator_norm(inputs_RTD)
    fitted = short_conv.fit(config, block.self_attn, normed_RTD, rotary)
    stand_in.conv.load_state_dict(fitted.state_dict())
    stand_in.requires_grad_(False)
    stand_in.conv.requires_grad_(True)
    errors = regression.fit_block(stand_in, inputs_RTD, targets_RTD, rotary, fit)
    given: list[torch.Tensor] = []
    handle = stand_in.conv.out_proj.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        stand_in.conv(normed_RTD[: fit.rows])
    handle.remove()
    channels_C = given[0].float().abs().mean(1).pow(2).mean(0).sqrt()
    tensors = {name: tensor.contiguous() for name, tensor in stand_in.conv.state_dict().items()}
    save_file({**tensors, "channels": channels_C}, kept.with_suffix(".safetensors"))
    write_json(kept.with_suffix(".json"), [round(error, 6) for error in errors])


def _load(config: Any, kept: Path) -> Convolution:
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    tensors = load_file(kept.with_suffix(".safetensors"))
    channels_C = tensors.pop("channels")
    module = Lfm2ShortConv(config, 0).float()
    module.load_state_dict(tensors)
    before, after = json.loads(kept.with_suffix(".json").read_text())
    return Convolution(module, channels_C, (before, after))
