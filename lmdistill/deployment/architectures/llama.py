"""Llama and its kin (Qwen2, Qwen3): pre-norm attention and a gated MLP in every layer.

Axes: H attention heads, K key/value heads, D width of a head, E hidden size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from lmdistill.deployment.architectures.base import Architecture, Shape, architecture


class LlamaLike(Architecture):
    """What Llama, Qwen2 and Qwen3 share."""

    qk_norms: ClassVar[bool] = False

    def biased_projections(self) -> tuple[str, ...]:
        """The projections of a layer that carry a bias."""
        return ()

    def refusals(self) -> list[str]:
        """Anything but SiLU, or a sliding window."""
        found = super().refusals()
        if self.config.get("hidden_act", "silu") != "silu":
            found.append(f"hidden_act is '{self.config['hidden_act']}', llama.cpp uses silu")
        if self.config.get("use_sliding_window"):
            found.append("use_sliding_window is on")
        return found

    def _projections(self) -> dict[str, Shape]:
        config, D = self.config, self.head_dim
        H, E, F = config["num_attention_heads"], config["hidden_size"], config["intermediate_size"]
        K = config.get("num_key_value_heads") or H
        attention = {"q_proj": (H * D, E), "k_proj": (K * D, E), "v_proj": (K * D, E), "o_proj": (E, H * D)}
        mlp = {"gate_proj": (F, E), "up_proj": (F, E), "down_proj": (E, F)}
        return {
            **{f"self_attn.{name}": shape for name, shape in attention.items()},
            **{f"mlp.{name}": shape for name, shape in mlp.items()},
        }

    def tensors(self) -> dict[str, Shape]:
        """Embeddings, per layer the norms and projections, the last norm, and the head where it is not tied."""
        E, projections = self.config["hidden_size"], self._projections()
        found: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, E)}
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            found[f"{layer}.input_layernorm.weight"] = (E,)
            for name, shape in projections.items():
                found[f"{layer}.{name}.weight"] = shape
            for name in self.biased_projections():
                found[f"{layer}.{name}.bias"] = projections[name][:1]
            if self.qk_norms:
                found[f"{layer}.self_attn.q_norm.weight"] = found[f"{layer}.self_attn.k_norm.weight"] = (self.head_dim,)
            found[f"{layer}.post_attention_layernorm.weight"] = (E,)
        found["model.norm.weight"] = (E,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab_size, E)
        return found

    def add_metadata(self, writer: Any) -> None:
        """Feed-forward width, key/value heads, head width and the norms' epsilon."""
        super().add_metadata(writer)
        config = self.config
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)


@architecture("llama", "llama")
class Llama(LlamaLike):
    """Llama; llama.cpp rotates neighbouring pairs of a head where transformers rotates its halves."""

    rope_types = ("default", "llama3")

    def biased_projections(self) -> tuple[str, ...]:
        """What `attention_bias` and `mlp_bias` switch on."""
        names = tuple(self._projections())
        attention, mlp = (tuple(name for name in names if name.startswith(part)) for part in ("self_attn", "mlp"))
        return (attention if self.config.get("attention_bias") else ()) + (mlp if self.config.get("mlp_bias") else ())

    def convert(self, source: str, tensor: Any) -> Any:
        """Interleave the two halves of every query and key head, so that pairs that rotate together are neighbours."""
        if ".q_proj." not in source and ".k_proj." not in source:
            return tensor
        halves = tensor.reshape(-1, 2, self.head_dim // 2, *tensor.shape[1:])  # [heads, half, D/2, …]
        return halves.transpose(1, 2).reshape(tensor.shape)

    def extra_tensors(self) -> dict[str, Any]:
        """Llama 3's stretching of the slow rotary frequencies, as the divisors llama.cpp reads."""
        rope = self.rope
        if rope["rope_type"] != "llama3":
            return {}
        import torch  # not there on a device that only times random models

        trained = rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        divisors = []
        for i in range(0, self.head_dim, 2):
            turns = trained / (2 * math.pi * rope["rope_theta"] ** (i / self.head_dim))  # over the trained context
            blend = min(1.0, max(0.0, (turns - low) / (high - low)))
            divisors.append(1 / ((1 - blend) / factor + blend))
        return {"rope_freqs.weight": torch.tensor(divisors, dtype=torch.float32)}


@architecture("qwen2", "qwen2")
class Qwen2(LlamaLike):
    """Qwen2: biases on queries, keys and values."""

    def biased_projections(self) -> tuple[str, ...]:
        """Queries, keys and values."""
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@architecture("qwen3", "qwen3")
class Qwen3(LlamaLike):
    """Qwen3: every query and key head is normalised."""

    qk_norms = True

    def refusals(self) -> list[str]:
        """Biases, which llama.cpp's Qwen3 does not read."""
        return super().refusals() + (["attention_bias is on"] if self.config.get("attention_bias") else [])
