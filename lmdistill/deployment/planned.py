"""The config.json a student will have, as far as its recipe and its teacher tell before it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdistill.pipeline.stage import PreflightContext

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


def student_keys(ctx: PreflightContext[Any], teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys of the student stage behind a stage; after a search, those of the largest student it may choose."""
    if (student := ctx.ancestor("student")) is not None:
        return student.config.model_dump()
    if (search := ctx.ancestor("search")) is None:
        return None
    from lmdistill.search.ahead import largest

    return largest(search.config, teacher)  # type: ignore[arg-type]


def config_ahead(ctx: PreflightContext[Any], role: str) -> dict[str, Any] | None:
    """config.json of the model that plays `role`, where it is there or the recipe tells what it will be."""
    planned, teacher = ctx.one(role), _config_of(ctx.teacher.path if ctx.teacher else None)
    if planned.artefact is not None:
        return _config_of(planned.artefact.model().path)
    if planned.stage == "teacher" or teacher is None:
        return teacher
    student = planned if planned.stage == "student" else ctx.ancestor("student")
    return None if student is None else planned_config(student.config.model_dump(), teacher)


def _config_of(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config
