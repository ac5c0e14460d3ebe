"""LFM2: a gated short convolution or attention in each layer, then a gated MLP.

Axes: H attention heads, K key/value heads, D width of a head, E hidden size, F feed-forward width, L taps of a
convolution, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from lmdistill.deployment.architectures.base import Architecture, Shape, architecture


@architecture("lfm2", "lfm2")
class Lfm2(Architecture):
    """LFM2's hybrid stack; a layer without key/value heads is a convolution to llama.cpp."""

    tied_by_default = True

    @property
    def layer_types(self) -> list[str]:
        """`conv` or `full_attention` for each layer."""
        config = self.config
        if config.get("layer_types"):
            return list(config["layer_types"])
        count = config["num_hidden_layers"]
        attention = config.get("full_attn_idxs")
        at = set(range(count) if attention is None else attention)
        return ["full_attention" if i in at else "conv" for i in range(count)]

    @property
    def feed_forward_width(self) -> int:
        """F after the adjustment that `block_auto_adjust_ff_dim` asks for."""
        config = self.config
        width = int(config.get("block_ff_dim") or config["intermediate_size"])
        if not config.get("block_auto_adjust_ff_dim", True):
            return width
        width = int(2 * width / 3)
        if (multiplier := config.get("block_ffn_dim_multiplier", 1.0)) is not None:
            multiple = int(config.get("block_multiple_of", 256))
            width = -(-int(multiplier * width) // multiple) * multiple
        return width

    def refusals(self) -> list[str]:
        """Biased convolutions, layers of another or of one kind only, heads that do not fill the hidden size."""
        found = super().refusals()
        if self.config.get("conv_bias"):
            found.append("conv_bias is on, which llama.cpp's lfm2 does not read")
        if strange := sorted(set(self.layer_types) - {"conv", "full_attention"}):
            found.append(f"layer types {strange} are neither conv nor full_attention")
        for kind in ("full_attention", "conv"):
            if kind not in self.layer_types:  # llama.cpp aborts on such a file
                found.append(f"no layer is {kind}, and llama.cpp's lfm2 needs one of each kind")
        if self.head_dim * self.config["num_attention_heads"] != self.config["hidden_size"]:
            found.append("the attention heads together are not as wide as hidden_size")
        return found

    def _operator(self, kind: str) -> dict[str, Shape]:
        config, D = self.config, self.head_dim
        E, H, K = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        if kind == "conv":
            return {"conv.conv": (E, 1, config["conv_L_cache"]), "conv.in_proj": (3 * E, E), "conv.out_proj": (E, E)}
        norms: dict[str, Shape] = {"self_attn.q_layernorm": (D,), "self_attn.k_layernorm": (D,)}
        projections = {"q_proj": (H * D, E), "k_proj": (K * D, E), "v_proj": (K * D, E), "out_proj": (E, H * D)}
        return {**{f"self_attn.{name}": shape for name, shape in projections.items()}, **norms}

    def tensors(self) -> dict[str, Shape]:
        """Embeddings, per layer the operator and the MLP with their norms, the last norm, the head where untied."""
        E, F = self.config["hidden_size"], self.feed_forward_width
        found: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, E)}
        for i, kind in enumerate(self.layer_types):
            parts: dict[str, Shape] = {
                "operator_norm": (E,),
                **self._operator(kind),
                "ffn_norm": (E,),
                "feed_forward.w1": (F, E),
                "feed_forward.w3": (F, E),
                "feed_forward.w2": (E, F),
            }
            found.update({f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()})
        found["model.embedding_norm.weight"] = (E,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab_size, E)
        return found

    def add_metadata(self, writer: Any) -> None:
        """Key/value heads layer by layer (0: a convolution), taps, feed-forward width and the norms' epsilon."""
        super().add_metadata(writer)
        config = self.config
        heads = config["num_key_value_heads"]
        writer.add_head_count_kv([heads if kind == "full_attention" else 0 for kind in self.layer_types])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        writer.add_feed_forward_length(self.feed_forward_width)
        writer.add_layer_norm_rms_eps(config["norm_eps"])

    def convert(self, source: str, tensor: Any) -> Any:
        """Drop the middle axis of a convolution's taps `[E, 1, L]`."""
        return tensor.squeeze(1) if source.endswith("conv.conv.weight") else tensor

    def keeps_f32(self, shape: Shape) -> bool:
        """Also the taps `[E, L]`, which llama.cpp's convolution reads as 32-bit only."""
        return super().keeps_f32(shape) or shape[-1] == self.config["conv_L_cache"]
