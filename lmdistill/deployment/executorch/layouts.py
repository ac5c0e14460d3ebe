"""Which architectures ship as a `.pte`: what a decoder takes from config.json, one decorated function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmdistill.deployment.architectures import ARCHITECTURES, Architecture
from lmdistill.deployment.architectures.lfm2 import Lfm2
from lmdistill.errors import PreflightError, nearest

ROPE_TYPES = ("default", "linear", "llama3")  # whose angles depend on nothing but the position


@dataclass(frozen=True)
class Layout:
    """What a decoder is made of, by the names its checkpoint gives them."""

    layers: tuple[str, ...]  # "full_attention" or "conv" each
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    tied: bool
    operator_norm: str  # in a layer, before its operator
    mlp_norm: str  # and before its MLP
    attention_out: str
    mlp: tuple[str, str, str]  # gate, up, down
    final_norm: str
    head_norms: tuple[str, str] | None = None  # of queries and keys

    @property
    def head(self) -> str:
        """The tensor that the logits come from."""
        return "model.embed_tokens" if self.tied else "lm_head"


LayoutMaker = Callable[[Architecture], Layout]
LAYOUTS: dict[str, LayoutMaker] = {}


def layout(model_type: str) -> Callable[[LayoutMaker], LayoutMaker]:
    """Register a function as the one that lays out `model_type`."""

    def register(make: LayoutMaker) -> LayoutMaker:
        LAYOUTS[model_type] = make
        return make

    return register


def architecture_for_pte(config: Mapping[str, Any]) -> Architecture:
    """The tensors of a checkpoint with this config.json; raises PreflightError where no `.pte` can be made of it."""
    model_type = str(config.get("model_type", ""))
    if model_type not in LAYOUTS:
        raise PreflightError(
            f"cannot lower architecture '{model_type}' to ExecuTorch{nearest(model_type, LAYOUTS)}",
            why=f"lmdistill lowers {', '.join(sorted(LAYOUTS))}",
            fix="choose a student of one of these architectures, or drop the `pte_…` formats",
        )
    found = ARCHITECTURES[model_type](config)
    if refusals := _refusals(found):
        raise PreflightError(
            f"cannot lower this {model_type} model to ExecuTorch",
            why="; ".join(refusals),
            fix="use a model without this: the program would compute something else",
        )
    return found


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint; raises PreflightError where there is none."""
    architecture = architecture_for_pte(config)
    return LAYOUTS[architecture.model_type](architecture)


def _refusals(architecture: Architecture) -> list[str]:
    """Operators that the decoder has not."""
    config, found = architecture.config, []
    if architecture.rope["rope_type"] not in ROPE_TYPES:
        found.append(f"rope_type '{architecture.rope['rope_type']}' is not one of {', '.join(ROPE_TYPES)}")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act is '{config['hidden_act']}', not silu")
    if config.get("use_sliding_window"):
        found.append("use_sliding_window is on")
    if config.get("conv_bias"):
        found.append("conv_bias is on")
    if isinstance(architecture, Lfm2):
        strange = sorted(set(architecture.layer_types) - {"conv", "full_attention"})
        found += [f"layer type '{kind}' is neither conv nor full_attention" for kind in strange]
    return found


def _layout(architecture: Architecture, **names: Any) -> Layout:
    """What all configurations call alike, and `names`."""
    config = architecture.config
    return Layout(
        heads=int(config["num_attention_heads"]),
        kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        head_dim=architecture.head_dim,
        tied=architecture.tied,
        **names,
    )


def _llama_like(architecture: Architecture, **keys: Any) -> Layout:
    return _layout(
        architecture,
        layers=("full_attention",) * int(architecture.config["num_hidden_layers"]),
        eps=float(architecture.config["rms_norm_eps"]),
        operator_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        attention_out="o_proj",
        mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        final_norm="model.norm",
        **keys,
    )


@layout("llama")
def llama(architecture: Architecture) -> Layout:
    """Llama: attention and a gated MLP in every layer."""
    return _llama_like(architecture)


@layout("qwen2")
def qwen2(architecture: Architecture) -> Layout:
    """Qwen2: Llama's, with biases that its projections bring along."""
    return _llama_like(architecture)


@layout("qwen3")
def qwen3(architecture: Architecture) -> Layout:
    """Qwen3: Llama's with normalised queries and keys."""
    return _llama_like(architecture, head_norms=("q_norm", "k_norm"))


@layout("lfm2")
def lfm2(architecture: Architecture) -> Layout:
    """LFM2: a short convolution or attention in each layer."""
    assert isinstance(architecture, Lfm2)  # the class that this model type has
    return _layout(
        architecture,
        layers=tuple(architecture.layer_types),
        eps=float(architecture.config["norm_eps"]),
        operator_norm="operator_norm",
        mlp_norm="ffn_norm",
        attention_out="out_proj",
        mlp=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        final_norm="model.embedding_norm",
        head_norms=("q_layernorm", "k_layernorm"),
    )
