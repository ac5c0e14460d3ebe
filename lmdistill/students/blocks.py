"""Running a Llama-like or Lfm2 decoder block by block, so that parts can be left out, replaced or fitted alone.

Axes: B rows, T positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


def final_norm(model: Any) -> torch.nn.Module:
    """The norm before the head, under whichever name the architecture gives it."""
    return model.model.embedding_norm if hasattr(model.model, "embedding_norm") else model.model.norm


def embed(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The input of the first block `[B, T, D]`."""
    embedded: torch.Tensor = model.model.embed_tokens(tokens_BT)
    return embedded


def positions(model: Any, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary embedding's cosines and sines for positions 0 … T−1 of every row."""
    ids_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
    rotary: tuple[torch.Tensor, torch.Tensor] = (
        model.model.rotary_emb(hidden_BTD, ids_1T)
        if hasattr(model.model, "rotary_emb")
        else model.model.pos_emb(hidden_BTD, ids_1T)
    )
    return rotary


def run_block(block: Any, hidden_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One decoder block under the causal mask."""
    out = block(hidden_BTD, position_embeddings=rotary, attention_mask=None)
    return out if isinstance(out, torch.Tensor) else out[0]


def logits(model: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The head's logits `[B, T, V]` of the last block's output."""
    out: torch.Tensor = model.lm_head(final_norm(model)(hidden_BTD))
    return out


class KlReference:
    """A model's distribution at N positions, to measure how far others are from it."""

    def __init__(self, logits_NV: torch.Tensor) -> None:
        """Keep probabilities in the logits' own precision; their entropy belongs to what is kept."""
        self.probs_NV = logits_NV.float().softmax(-1).to(logits_NV.dtype)
        kept_NV = self.probs_NV.float()
        self._negative_entropy = torch.special.xlogy(kept_NV, kept_NV).sum().item()
        self._mass_N = kept_NV.sum(-1)

    def mean_kl(self, logits_NV: torch.Tensor) -> float:
        """Mean KL(reference ‖ other) in nats: Σ p·log p − Σ p·z + lse(z), one pass over the logits."""
        logits_NV = logits_NV.float()
        cross = (logits_NV.logsumexp(-1) * self._mass_N).sum() - (self.probs_NV * logits_NV).sum()
        total: float = self._negative_entropy + cross.item()
        return float(total / logits_NV.shape[0])
