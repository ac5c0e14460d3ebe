"""The shape of a student: its config from the recipe's keys and the teacher's, and what makes a shape impossible."""

from __future__ import annotations

from typing import Any

GROWABLE = ("llama",)  # blocks of norm, attention, norm, gated MLP, without biases


def problems(config: Any, teacher: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the asked student, as (what, what to do), before anything is loaded."""
    found = []
    if config.init == "grow":
        found += _growth_problems(config, teacher)
    width, heads = (
        _value(config.hidden_size, teacher, "hidden_size"),
        _value(config.heads, teacher, "num_attention_heads"),
    )
    kv_heads = _value(config.kv_heads, teacher, "num_key_value_heads")
    if config.architecture == "lfm2" and config.attention_layers in (0, config.layers):
        found.append(
            (
                f"an lfm2 student with attention in {config.attention_layers} of {config.layers} layers is no hybrid",
                "llama.cpp wants blocks of both kinds: change attention_layers, or use `architecture: llama`",
            )
        )
    if width % heads or heads % kv_heads:
        found.append(
            (
                f"width {width}, heads {heads} and key heads {kv_heads} do not divide",
                "make hidden_size a multiple of heads, and heads a multiple of kv_heads",
            )
        )
    return found


def _growth_problems(config: Any, teacher: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    if teacher["model_type"] not in GROWABLE:
        found.append(
            (
                f"a student cannot be grown from a teacher of type '{teacher['model_type']}'",
                f"growable: {', '.join(GROWABLE)}; else use `init: random`",
            )
        )
    if config.layers > teacher["num_hidden_layers"]:
        found.append(
            (
                f"layers {config.layers} is more than the teacher's {teacher['num_hidden_layers']}",
                "a grown student keeps some of the teacher's blocks: ask for fewer",
            )
        )
    for key in ("hidden_size", "intermediate_size", "heads", "kv_heads"):
        if getattr(config, key) is not None:
            found.append((f"`{key}` is the teacher's in a grown student", f"remove `{key}`, or use `init: random`"))
    return found


def _value(own: int | None, teacher: dict[str, Any], key: str) -> int:
    return int(own if own is not None else teacher.get(key) or teacher["num_attention_heads"])


def layer_types(layers: int, attention: int) -> list[str]:
    """Attention spread evenly, the first block a convolution where there is one, as in LFM2."""
    spread = {round((index + 0.5) * layers / attention - 0.5) for index in range(attention)} if attention else set()
    return ["full_attention" if index in spread else "conv" for index in range(layers)]


def random_config(config: Any, teacher: Any) -> Any:
    """The transformers config of a student from random, with the teacher's vocabulary and, where null, its widths."""
    import copy

    from lmdistill.students.lfm2 import config_like

    like = copy.deepcopy(teacher)
    like.hidden_size = config.hidden_size or teacher.hidden_size
    like.intermediate_size = config.intermediate_size or teacher.intermediate_size
    like.num_attention_heads = config.heads or teacher.num_attention_heads
    like.num_key_value_heads = config.kv_heads or teacher.num_key_value_heads
    like.head_dim = like.hidden_size // like.num_attention_heads
    like.num_hidden_layers = config.layers
    if config.architecture == "lfm2":
        return config_like(
            like, layer_types(config.layers, config.attention_layers), config.kernel, teacher.rms_norm_eps
        )
    like.tie_word_embeddings = True
    return like
