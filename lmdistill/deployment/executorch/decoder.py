"""One decoder for every architecture that ships as a `.pte`: a checkpoint's layers over caches of a fixed size.

What a call reads and writes is explicit, so that one exported method serves prompts, single tokens and scoring:
`tokens` go to `positions`, see what `mask` lets them see of the first P positions, and `wanted` says whose logits
come back. The shapes are the lengths: nothing is padded, and attention costs what is live, not what fits.

It is written for XNNPACK, which has no slice of a dynamic shape, no gather and no mean over a row: halves are swapped
and rows averaged by matrix products, and a projection of several parts is cut into one for each.

Axes: S tokens of a call, P positions they may see, C positions of a cache, N wanted logits, E hidden size, H heads,
K key/value heads, G heads that share one, D width of a head, L taps of a convolution, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from lmdistill.deployment.executorch.layouts import Layout


class Weights(Protocol):
    """The layers that a checkpoint's tensors make, in whatever type they ship."""

    def linear(self, name: str, part: int = 0, parts: int = 1) -> nn.Module:
        """The layer of the matrix `name`, or of one of `parts` equal groups of its rows."""

    def embedding(self) -> nn.Module:
        """The layer that turns token ids `[S]` into vectors `[S, E]`."""

    def vector(self, name: str) -> torch.Tensor:
        """A tensor in float32."""


class RmsNorm(nn.Module):  # type: ignore[misc]
    """x / rms(x) · weight over the last axis."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight_D, requires_grad=False)
        self.register_buffer("average", torch.full((1, len(weight_D)), 1 / len(weight_D)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[…, D]` to the same."""
        return hidden * torch.rsqrt(functional.linear(hidden * hidden, self.average) + self.eps) * self.weight


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention over caches of keys and values `[C, K · D]`."""

    def __init__(self, layout: Layout, name: str, weights: Weights, context: int) -> None:
        super().__init__()
        self.layout = layout
        for part in ("q_proj", "k_proj", "v_proj"):
            self.add_module(part, weights.linear(f"{name}.{part}"))
        self.out = weights.linear(f"{name}.{layout.attention_out}")
        norms: list[nn.Module] = [
            RmsNorm(weights.vector(f"{name}.{norm}"), layout.eps) for norm in layout.head_norms or ()
        ]
        self.q_norm, self.k_norm = norms if norms else [nn.Identity(), nn.Identity()]
        for cache in ("keys", "values"):
            self.register_buffer(cache, torch.zeros(context, layout.kv_heads * layout.head_dim))

    def forward(self, hidden_SE: torch.Tensor, call: Call) -> torch.Tensor:
        """What attends, `[S, E]`; keys and values go into the caches."""
        K, D = self.layout.kv_heads, self.layout.head_dim
        G = self.layout.heads // K
        P = call.mask_GSxP.shape[1]
        q_SxHD = call.rotate(self.q_norm(self.q_proj(hidden_SE).view(-1, D)), K * G)
        self.keys[call.positions_S] = call.rotate(self.k_norm(self.k_proj(hidden_SE).view(-1, D)), K).view(-1, K * D)
        self.values[call.positions_S] = self.v_proj(hidden_SE)
        q_KGSxD = q_SxHD.view(-1, K, G, D).permute(1, 2, 0, 3).reshape(K, -1, D)
        k_KDP = self.keys[:P].view(-1, K, D).permute(1, 2, 0)
        v_KPD = self.values[:P].view(-1, K, D).permute(1, 0, 2)
        scores_KGSxP = torch.bmm(q_KGSxD * D**-0.5, k_KDP) + call.mask_GSxP
        seen_KGSxD = torch.bmm(scores_KGSxP.softmax(-1), v_KPD)
        seen_SE = seen_KGSxD.view(K, G, -1, D).permute(2, 0, 1, 3).reshape(-1, K * G * D)
        return self.out(seen_SE)


class ShortConvolution(nn.Module):  # type: ignore[misc]
    """LFM2's gated convolution along the sequence; the inputs it still needs wait in a state `[L − 1, E]`."""

    def __init__(self, name: str, weights: Weights) -> None:
        super().__init__()
        self.gate_in, self.gate_out, self.value = (weights.linear(f"{name}.in_proj", part, 3) for part in range(3))
        self.out = weights.linear(f"{name}.out_proj")
        taps_EL = weights.vector(f"{name}.conv").squeeze(1)
        self.taps = nn.ParameterList([nn.Parameter(tap.contiguous(), requires_grad=False) for tap in taps_EL.T])
        self.register_buffer("state", torch.zeros(len(self.taps) - 1, len(taps_EL)))

    def forward(self, hidden_SE: torch.Tensor, call: Call) -> torch.Tensor:
        """What is mixed, `[S, E]`; at position 0 the state of an earlier sequence does not count."""
        gated_SE = self.gate_in(hidden_SE) * self.value(hidden_SE)
        inputs = torch.cat((torch.where(call.goes_on_1, self.state, 0.0), gated_SE))
        S = gated_SE.shape[0]
        mixed_SE = sum(inputs[at : at + S] * tap for at, tap in enumerate(self.taps))
        self.state.copy_(inputs[S:])
        return self.out(self.gate_out(hidden_SE) * mixed_SE)


class Block(nn.Module):  # type: ignore[misc]
    """An operator and an MLP, each on what its norm makes of the stream."""

    def __init__(self, layout: Layout, index: int, weights: Weights, context: int) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.operator_norm = RmsNorm(weights.vector(f"{name}.{layout.operator_norm}"), layout.eps)
        self.mlp_norm = RmsNorm(weights.vector(f"{name}.{layout.mlp_norm}"), layout.eps)
        if layout.layers[index] == "conv":
            self.operator: nn.Module = ShortConvolution(f"{name}.conv", weights)
        else:
            self.operator = Attention(layout, f"{name}.self_attn", weights, context)
        self.gate, self.up, self.down = (weights.linear(f"{name}.{part}") for part in layout.mlp)

    def forward(self, stream_SE: torch.Tensor, call: Call) -> torch.Tensor:
        """The stream after this layer."""
        stream_SE = stream_SE + self.operator(self.operator_norm(stream_SE), call)
        hidden_SE = self.mlp_norm(stream_SE)
        return stream_SE + self.down(functional.silu(self.gate(hidden_SE)) * self.up(hidden_SE))


@dataclass(frozen=True)
class Call:
    """What all layers of one call share."""

    positions_S: torch.Tensor
    mask_GSxP: torch.Tensor  # 0 where a token sees a position, else so low that its weight is 0
    goes_on_1: torch.Tensor  # whether this call goes on with a sequence
    cos_S1D: torch.Tensor
    sin_S1D: torch.Tensor
    swap_DD: torch.Tensor  # x · swapᵀ = (−second half, first half), exactly

    def rotate(self, heads_SxHD: torch.Tensor, heads: int) -> torch.Tensor:
        """Heads `[S · H, D]` turned by their positions, `[S, H, D]`."""
        D = heads_SxHD.shape[-1]
        swapped_SHD = functional.linear(heads_SxHD, self.swap_DD).view(-1, heads, D)
        return heads_SxHD.view(-1, heads, D) * self.cos_S1D + swapped_SHD * self.sin_S1D


class Decoder(nn.Module):  # type: ignore[misc]
    """A checkpoint's decoder over its own caches; batch of one."""

    def __init__(self, layout: Layout, weights: Weights, rope_CD: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.layout = layout
        context, D = rope_CD[0].shape
        self.embedding = weights.embedding()
        self.blocks = nn.ModuleList([Block(layout, index, weights, context) for index in range(len(layout.layers))])
        self.final_norm = RmsNorm(weights.vector(layout.final_norm), layout.eps)
        self.head = weights.linear(layout.head)
        eye, zero = torch.eye(D // 2), torch.zeros(D // 2, D // 2)
        self.register_buffer("swap", torch.cat((torch.cat((zero, -eye), 1), torch.cat((eye, zero), 1))))
        self.register_buffer("cos", rope_CD[0])
        self.register_buffer("sin", rope_CD[1])

    def forward(
        self, tokens_S: torch.Tensor, positions_S: torch.Tensor, mask_SP: torch.Tensor, wanted_N: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[N, V]` of the tokens after `wanted` ones of this call."""
        D, G = self.layout.head_dim, self.layout.heads // self.layout.kv_heads
        call = Call(
            positions_S,
            torch.cat([mask_SP] * G) if G > 1 else mask_SP,
            positions_S[:1] > 0,
            self.cos[positions_S].view(-1, 1, D),
            self.sin[positions_S].view(-1, 1, D),
            self.swap,
        )
        stream_SE = self.embedding(tokens_S)
        for block in self.blocks:
            stream_SE = block(stream_SE, call)
        logits: torch.Tensor = self.head(self.final_norm(stream_SE.index_select(0, wanted_N)))
        return logits
