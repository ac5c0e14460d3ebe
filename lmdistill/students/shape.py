"""The shape of a student: its config from the recipe's keys and the teacher's, and what makes a shape impossible."""

from __future__ import annotations

from typing import Any

GROWABLE = ("llama",)  # blocks of norm, attention, norm, gated MLP
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0  # where the teacher's config names none
Problem = tuple[str, str]  # what, what to do


def problems(config: Any, teacher: dict[str, Any]) -> list[Problem]:
    """What is wrong with the asked student, as (what, what to do), before anything is loaded."""
    found: list[Problem] = []
    if config.init == "grow":
        if teacher.get("model_type") not in GROWABLE:  # its config.json names its sizes in words of its own
            return [_ungrowable(teacher)]
        found += _growth_problems(config, teacher)
        if config.architecture == "lfm2":
            found += _exactness_problems(teacher)
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


def _exactness_problems(teacher: dict[str, Any]) -> list[Problem]:
    """What a Llama-like teacher may have that an Lfm2 model has no place for."""
    found = []
    instead = "use `architecture: llama`, or `init: random`"
    if not teacher.get("tie_word_embeddings", False):
        found.append(("the teacher's head is not tied to its embeddings, an lfm2 student's is", instead))
    return found + no_place_problems(teacher, "an lfm2 student", instead)


def no_place_problems(teacher: dict[str, Any], student: str, instead: str) -> list[Problem]:
    """What a Llama-like teacher may have that `student` has no place for: biases, heads that do not fill the width."""
    found = []
    if teacher.get("attention_bias") or teacher.get("mlp_bias"):
        found.append((f"the teacher's projections have biases, {student}'s have none", instead))
    heads = teacher["num_attention_heads"]
    head = teacher.get("head_dim") or teacher["hidden_size"] // heads
    if heads * head != teacher["hidden_size"]:
        found.append((f"{student} needs heads × head width = width; the teacher has {heads} × {head}", instead))
    return found


def _ungrowable(teacher: dict[str, Any]) -> Problem:
    return (
        f"a student cannot be grown from a teacher of type '{teacher.get('model_type')}'",
        f"growable: {', '.join(GROWABLE)}; else use `init: random`",
    )


def _growth_problems(config: Any, teacher: dict[str, Any]) -> list[Problem]:
    found = []
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
    from lmdistill.students.lfm2 import config_like

    width = config.hidden_size or teacher.hidden_size
    heads = config.heads or teacher.num_attention_heads
    like = llama_config(
        teacher,
        vocab_size=teacher.vocab_size,
        hidden_size=width,
        intermediate_size=config.intermediate_size or teacher.intermediate_size,
        layers=config.layers,
        heads=heads,
        kv_heads=config.kv_heads or getattr(teacher, "num_key_value_heads", None) or heads,
        head_dim=width // heads,
    )
    if config.architecture == "lfm2":
        return config_like(like, layer_types(config.layers, config.attention_layers), config.kernel, like.rms_norm_eps)
    return like


def llama_config(
    teacher: Any,
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Any:
    """A LlamaConfig of these widths with the teacher's context, rotary base, norm and special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=teacher.max_position_embeddings,
        rms_norm_eps=getattr(teacher, "rms_norm_eps", NORM_EPS),
        rope_parameters={"rope_type": "default", "rope_theta": _rope_theta(teacher)},
        tie_word_embeddings=True,
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
        pad_token_id=teacher.pad_token_id,
    )


def _rope_theta(teacher: Any) -> float:
    """The teacher's rotary base; a scaled rotary embedding is for contexts a student from random has not seen."""
    parameters = getattr(teacher, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(teacher, "rope_theta", None) or ROPE_THETA)
