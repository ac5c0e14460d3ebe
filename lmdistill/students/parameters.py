"""How many parameters a student has, by formula, before it is built."""

from __future__ import annotations

from typing import Any

from lmdistill.errors import LmdistillError


def lfm2(config: Any) -> int:
    """V·d + n_conv(4d²+k·d) + n_attn(2d²+2·d·kv·hd+2hd) + L(3·d·ff+2d) + d, tied (LFM2, arXiv 2511.23404)."""
    d, kernel = config.hidden_size, config.conv_L_cache
    head = d // config.num_attention_heads
    convs = sum(kind == "conv" for kind in config.layer_types)
    attentions = len(config.layer_types) - convs
    conv = 4 * d * d + kernel * d
    attention = 2 * d * d + 2 * d * config.num_key_value_heads * head + 2 * head
    layer = 3 * d * config.intermediate_size + 2 * d
    return int(config.vocab_size * d + convs * conv + attentions * attention + len(config.layer_types) * layer + d)


def llama(config: Any) -> int:
    """V·d (twice if untied) + L(2·d·heads·hd + 2·d·kv·hd + 3·d·ff + 2d) + d, no biases."""
    d = config.hidden_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    attention = 2 * d * config.num_attention_heads * head + 2 * d * config.num_key_value_heads * head
    layer = attention + 3 * d * config.intermediate_size + 2 * d
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return int(embeddings + config.num_hidden_layers * layer + d)


FORMULAS = {"lfm2": lfm2, "llama": llama}


def count(config: Any) -> int:
    """The number of parameters of a model with this config, tied ones once; LmdistillError for another type."""
    if config.model_type not in FORMULAS:
        raise LmdistillError(
            f"a student of type '{config.model_type}' is not known here",
            fix=f"take one of: {', '.join(FORMULAS)}",
        )
    return FORMULAS[config.model_type](config)
