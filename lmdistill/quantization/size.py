"""How few bits codes take: Huffman's mean length, and bits shared out among tensors by how much each one matters."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from lmdistill.errors import PreflightError
from lmdistill.quantization.placement import Placement

_LEAST, _MOST = 1, 8  # bits a weight


def huffman_bits(counts: Iterable[int]) -> float:
    """Mean length, in bits, of the optimal prefix code of symbols that occur so often; a lone symbol takes one bit."""
    heap = [count for count in counts if count > 0]
    total = sum(heap)
    if len(heap) < 2:
        return float(len(heap))
    heapq.heapify(heap)
    length = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        length += both
        heapq.heappush(heap, both)
    return length / total


def sizes(tensors: Mapping[str, torch.Tensor], placement: Placement) -> dict[str, Any]:
    """Bits a weight of the tensors on grids, scales included: as stored, and with Huffman codes."""
    stored = coded = weights = 0.0
    for name, grid in placement.on_grids().items():
        codes = grid.quantise(tensors[name].cpu(), placement.scales.get(name)).codes  # where the scales are
        counts = codes.flatten().to(torch.int64).sub_(int(codes.min())).bincount()
        weights += codes.numel()
        stored += grid.bits_per_weight * codes.numel()
        beside = grid.bits_per_weight - grid.code_bits
        coded += (huffman_bits(counts.tolist()) + beside) * codes.numel()
    return {"weights": int(weights), "bits": round(stored / weights, 4), "huffman_bits": round(coded / weights, 4)}


def shared_bits(
    norms: Mapping[str, float], weights: Mapping[str, int], mean: float, way: Literal["linear", "logarithmic"]
) -> dict[str, int]:
    """Bits a weight of each tensor, `mean` of them on average over all weights, more where the gradient is larger.

    `norms` are root mean squares of the gradients. Linear: bits in proportion to them; logarithmic: one bit more for
    each doubling, which evens out what each tensor's rounding costs. Whole numbers from 1 to 8 that stay within the
    budget; PreflightError where there is no such budget.
    """
    if not _LEAST <= mean <= _MOST:
        raise PreflightError(f"{mean} bits a weight cannot be shared out", fix="choose 1 to 8")
    total = sum(weights.values())
    if not any(norms.values()):
        raise PreflightError(
            "bits cannot be shared out: no tensor on the grid has a gradient on this text",
            fix="drop `quantize.share_bits`, or give text that the student does not know by heart",
        )
    floor = min(norm for norm in norms.values() if norm > 0)
    if way == "linear":
        average = sum(norms[name] * weights[name] for name in norms) / total
        ideal = {name: mean * norm / average for name, norm in norms.items()}
    else:
        logs = {name: math.log2(max(norm, floor)) for name, norm in norms.items()}
        average = sum(logs[name] * weights[name] for name in logs) / total
        ideal = {name: mean + value - average for name, value in logs.items()}
    bits = dict.fromkeys(norms, _LEAST)
    left = mean * total - total * _LEAST
    while affordable := [name for name in bits if bits[name] < _MOST and weights[name] <= left + 1e-9]:
        best = max(affordable, key=lambda name: (ideal[name] - bits[name], name))
        bits[best] += 1
        left -= weights[best]
    return bits


def gradient_norms(model: Any, names: Iterable[str], rows: Iterable[torch.Tensor]) -> dict[str, float]:
    """Root mean square of the gradient of the text's summed loss in each parameter, over rows of token ids `[R, T]`."""
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    for ids_RT in rows:
        predictions = ids_RT.shape[0] * (ids_RT.shape[1] - 1)
        if not predictions:
            continue
        (model(input_ids=ids_RT, labels=ids_RT, use_cache=False).loss * predictions).backward()
    norms = {name: math.sqrt(float(one.grad.pow(2).mean())) for name, one in chosen.items() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return norms
