"""The config.json a student will have, as far as its recipe and its teacher tell before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEACHERS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}


def planned_config(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `lmdistill.deployment.architectures` reads of a config.json, for a student made after this teacher.

    `student` holds the student stage's keys; which layers attend is not known yet, only how many. None where the
    student comes from a checkpoint of its own.
    """
    if student.get("init") == "checkpoint" or "architecture" not in student:
        return None
    layers, attention = student["layers"], student["attention_layers"]
    widths = {name: student.get(key) or teacher[name] for key, name in _TEACHERS.items()}
    grown_llama = student["init"] == "grow" and student["architecture"] == "llama"  # keeps the width of a head
    return {
        **({"head_dim": teacher.get("head_dim")} if grown_llama else {}),
        **{key: teacher[key] for key in ("vocab_size", "max_position_embeddings")},
        **{key: teacher[key] for key in ("rope_parameters", "rope_theta", "rope_scaling") if key in teacher},
        **widths,
        "model_type": student["architecture"],
        "num_hidden_layers": layers,
        "layer_types": ["conv"] * (layers - attention) + ["full_attention"] * attention,
        "conv_L_cache": student["kernel"],
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
    }


def planned_parameters(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> int | None:
    """How many parameters that student will have, by formula; None where the plan does not say."""
    from types import SimpleNamespace

    from lmdistill.students import parameters

    config = planned_config(student, teacher)
    return None if config is None else parameters.count(SimpleNamespace(**config))
