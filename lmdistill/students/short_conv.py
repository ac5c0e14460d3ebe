"""A gated short convolution that starts as close as it can to the attention it replaces, by closed-form fits.

Lfm2's operator is `out_proj(C ⊙ conv(B ⊙ x))` with B, C and x linear in the block's input. Here
- B and C are ridge fits of the constant one: the convolution starts ungated;
- x is the attention's own value projection, each value head repeated for its group of query heads;
- each channel's taps are the least-squares fit of the attention's mixed values by the last k values;
- `out_proj` is the ridge fit of the attention's output by the channels that come out of the convolution.

Axes: N positions (all rows), B rows, T positions, D hidden width, k taps, L lags.
"""

from __future__ import annotations

from typing import Any

import torch

RIDGE = 1e-3  # relative to the mean diagonal of the Gram matrix


def _ridge(features_ND: torch.Tensor, targets_NE: torch.Tensor) -> torch.Tensor:
    """The weight `[E, D]` that minimises |features @ weight.T − targets|² with a little shrinkage."""
    features, targets = features_ND.double(), targets_NE.double()
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, features.T @ targets).T.float()


def _attend(attention: Any, normed_BTD: torch.Tensor, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention's mixed values (before `out_proj`) and its output, both `[B, T, D]`."""
    seen: list[torch.Tensor] = []
    handle = attention.out_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    out_BTD, _ = attention(normed_BTD, position_embeddings=rotary, attention_mask=None)
    handle.remove()
    return seen[0], out_BTD


def _lagged(values_BTD: torch.Tensor, taps: int) -> torch.Tensor:
    """Values at t−k+1 … t, zeros before the row's start `[B, T, D, k]`."""
    padded = torch.nn.functional.pad(values_BTD, (0, 0, taps - 1, 0))
    return padded.unfold(1, taps, 1)


def _fit_taps(values_BTD: torch.Tensor, mixed_BTD: torch.Tensor, taps: int) -> torch.Tensor:
    """Per channel the k taps `[D, k]` that best turn values into the attention's mixed values."""
    lags_DNk = _lagged(values_BTD, taps).permute(2, 0, 1, 3).flatten(1, 2).double()
    target_DN1 = mixed_BTD.permute(2, 0, 1).flatten(1)[..., None].double()
    gram_Dkk = lags_DNk.transpose(1, 2) @ lags_DNk
    gram_Dkk += RIDGE * gram_Dkk.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(taps)
    return torch.linalg.solve(gram_Dkk, lags_DNk.transpose(1, 2) @ target_DN1)[..., 0].float()


def fit(config: Any, attention: Any, normed_BTD: torch.Tensor, rotary: Any) -> Any:
    """An Lfm2ShortConv standing in for `attention` on the inputs `normed_BTD`; `config` is the student's."""
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    width, taps = config.hidden_size, config.conv_L_cache
    local = Lfm2ShortConv(config, config.layer_types.index("conv")).float()
    with torch.no_grad():
        mixed_BTD, out_BTD = _attend(attention, normed_BTD, rotary)
        inputs_ND = normed_BTD.flatten(0, 1).float()
        gate_DD = _ridge(inputs_ND, torch.ones(inputs_ND.shape[0], 1)).expand(width, width)
        groups = config.num_attention_heads // config.num_key_value_heads
        head = width // config.num_attention_heads
        values = attention.v_proj.weight.float().unflatten(0, (-1, head))
        value_DD = values.repeat_interleave(groups, 0).flatten(0, 1)
        local.in_proj.weight.copy_(torch.cat([gate_DD, gate_DD, value_DD]))
        values_BTD = normed_BTD.float() @ value_DD.T
        local.conv.weight.copy_(_fit_taps(values_BTD, mixed_BTD.float(), taps)[:, None])
        seen: list[torch.Tensor] = []
        handle = local.out_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        local(normed_BTD.float())
        handle.remove()
        local.out_proj.weight.copy_(_ridge(seen[0].flatten(0, 1), out_BTD.flatten(0, 1)))
    return local
