"""A Llama-like model as an Lfm2 model that computes the same: attention, MLPs, norms and embeddings carried over.

Lfm2 puts an RMSNorm on each query and key head; a Llama-like model has none. The two are made to agree by an
exact change of scale and one limit:

- The residual stream is multiplied by c (embeddings, `out_proj`, `w2` take the factor). Every RMSNorm of the
  stream is unchanged if its eps is multiplied by c²; the final norm's output does not change.
- With that larger eps, queries and keys scaled down by s are so small beside it that their RMSNorm is linear:
  `q·s / sqrt(mean((q·s)²) + eps) ≈ q·s / sqrt(eps)`; the norm's weight undoes the factor. What is left is a
  relative error of about half of `mean((q·s)²)/eps`, and its mean is calibrated away from activations.

c and s are powers of two, so no weight loses a digit.

Axes: H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

RESIDUAL_SCALE = 16.0  # c
LINEARITY = 0.01  # the bound asked of mean((q·s)²)/eps at a typical query

_FROM_LLAMA = {
    "input_layernorm.weight": "operator_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    "self_attn.k_proj.weight": "self_attn.k_proj.weight",
    "self_attn.v_proj.weight": "self_attn.v_proj.weight",
    "self_attn.o_proj.weight": "self_attn.out_proj.weight",
}
_SCALED_UP = ("mlp.down_proj.weight", "self_attn.o_proj.weight")


def config_like(teacher: Any, layer_types: Sequence[str], kernel: int, norm_eps: float) -> Any:
    """An Lfm2Config of the teacher's widths, heads, vocabulary and rotary base."""
    from transformers import Lfm2Config

    return Lfm2Config(
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        intermediate_size=teacher.intermediate_size,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(layer_types),
        num_attention_heads=teacher.num_attention_heads,
        num_key_value_heads=teacher.num_key_value_heads,
        max_position_embeddings=teacher.max_position_embeddings,
        norm_eps=norm_eps,
        rope_parameters=dict(teacher.rope_parameters),
        conv_L_cache=kernel,
        layer_types=list(layer_types),
        tie_word_embeddings=True,
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
        pad_token_id=teacher.pad_token_id,
        initializer_range=teacher.initializer_range,
    )


def measure_query_key_squares(model: Any, tokens_BT: torch.Tensor) -> list[tuple[float, float]]:
    """Per layer, the mean square of an entry of the queries and of the keys on a text."""
    squares: list[list[float]] = [[0.0, 0.0] for _ in model.model.layers]
    handles = []
    for index, layer in enumerate(model.model.layers):
        for slot, projection in enumerate((layer.self_attn.q_proj, layer.self_attn.k_proj)):

            def record(_m: Any, _i: Any, out: torch.Tensor, index: int = index, slot: int = slot) -> None:
                squares[index][slot] = out.float().pow(2).mean().item()

            handles.append(projection.register_forward_hook(record))
    with torch.inference_mode():
        model.model(tokens_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return [(q, k) for q, k in squares]


def from_llama(teacher: Any, tokens_BT: torch.Tensor, kernel: int = 3) -> Any:
    """The Lfm2 model, all attention, that computes what the Llama-like `teacher` computes, in float32.

    The teacher is tied and has no biases (shape.problems refuses others before any work).
    """
    from transformers import Lfm2ForCausalLM

    eps = teacher.config.rms_norm_eps * RESIDUAL_SCALE**2
    layers = teacher.config.num_hidden_layers
    model = Lfm2ForCausalLM(config_like(teacher.config, ["full_attention"] * layers, kernel, eps)).float().eval()
    source, target = teacher.state_dict(), {}
    target["model.embed_tokens.weight"] = source["model.embed_tokens.weight"].float() * RESIDUAL_SCALE
    # The head is tied to the embeddings, so the final norm takes the factor back.
    target["model.embedding_norm.weight"] = source["model.norm.weight"].float() / RESIDUAL_SCALE
    width = model.config.hidden_size // model.config.num_attention_heads
    for index, squares in enumerate(measure_query_key_squares(teacher, tokens_BT)):
        prefix = f"model.layers.{index}."
        for theirs, ours in _FROM_LLAMA.items():
            scale = RESIDUAL_SCALE if theirs in _SCALED_UP else 1.0
            target[prefix + ours] = source[prefix + theirs].float() * scale
        for letter, square in zip("qk", squares, strict=True):
            shrink = 2.0 ** math.floor(math.log2(math.sqrt(LINEARITY * eps / square)))
            target[f"{prefix}self_attn.{letter}_proj.weight"] *= shrink
            undo = math.sqrt(eps + square * shrink**2) / shrink
            target[f"{prefix}self_attn.{letter}_layernorm.weight"] = torch.full((width,), undo)
    target["lm_head.weight"] = target["model.embed_tokens.weight"]
    model.load_state_dict(target)
    model.tie_weights()
    return model
