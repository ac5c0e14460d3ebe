"""Makes a super-network of the teacher: units in their order of importance, a convolution beside every attention.

What takes time (importance, convolutions) is kept in the work folder, so that a stopped search goes on from there.

Axes: R rows, T positions, D hidden width.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmdistill.pipeline.stage import Progress
from lmdistill.search import importance
from lmdistill.search.importance import Importance
from lmdistill.search.operators import Convolution, fit_convolutions
from lmdistill.search.slicing import Part, axes_of, rows_of_heads, take
from lmdistill.search.supernet import SuperNet
from lmdistill.search.unit_order import UnitOrder
from lmdistill.students.regression import Fit


@dataclass(frozen=True)
class Making:
    """How a super-network comes about."""

    hybrid: bool  # whether there are convolutions
    kernel: int  # taps of the longest
    narrows: bool  # whether any candidate is narrower than the teacher
    importance_rows: int
    fit_rows: int
    fit: Fit


def make(source: Any, tokens_RT: torch.Tensor, how: Making, work: Path, progress: Progress) -> SuperNet:
    """The super-network of an all-attention `source` in float32 (see students/lfm2.py), on rows of the corpus."""
    work.mkdir(parents=True, exist_ok=True)
    fitted: list[Convolution] = []
    if how.hybrid:
        fitted = fit_convolutions(
            source, tokens_RT[: how.fit_rows], how.kernel, how.fit, work / "convolutions", progress
        )
        progress.note(f"convolutions: mean relative error {sum(c.errors[1] for c in fitted) / len(fitted):.4f}")
    net = SuperNet(copy.deepcopy(source), [one.module for one in fitted], how.kernel)
    net.to(tokens_RT.device)
    if how.narrows:
        scores = _kept_importance(source, tokens_RT[: how.importance_rows], how.fit, work / "importance.safetensors")
        net.order = reorder(net, scores, [one.channels_C for one in fitted])
    net.eval()
    return net


def _kept_importance(source: Any, tokens_RT: torch.Tensor, fit: Fit, kept: Path) -> Importance:
    if not kept.exists():
        measured = importance.measure(source, tokens_RT, fit.rows, fit.precision)
        partial = kept.with_suffix(".tmp")
        save_file({name: tensor.cpu() for name, tensor in asdict(measured).items()}, partial)
        partial.rename(kept)
    return Importance(**load_file(kept))


def reorder(net: SuperNet, scores: Importance, channels: list[torch.Tensor]) -> UnitOrder:
    """Put every unit in its order of importance, in place, and return that order; the whole computes the same."""
    by_block = []
    everywhere: dict[str, Part] = {"D": importance.order_of(scores.hidden_D)}
    for name, tensor in net.top().items():
        _put(tensor, name, everywhere)
    for place, block in enumerate(net.body.layers):
        queries, groups = importance.head_order(scores.heads_LH[place], net.full.kv_heads)
        own: dict[str, Part] = {
            **everywhere,
            "F": importance.order_of(scores.inner_LF[place]),
            "Q": rows_of_heads(queries, net.full.head_dim),
            "K": rows_of_heads(groups, net.full.head_dim),
        }
        by_block.append({axis: own[axis] for axis in ("Q", "K")})
        for name, parameter in block.named_parameters():
            _put(parameter, name, own)
        if channels:
            own["C"] = importance.order_of(channels[place])
            for name, parameter in net.convolutions[place].named_parameters():
                _put(parameter, f"conv.{name}", own)
    return UnitOrder(everywhere, tuple(by_block))


def _put(parameter: torch.Tensor, name: str, order: dict[str, Part]) -> None:
    with torch.no_grad():
        parameter.copy_(take(parameter, axes_of(name), order))
