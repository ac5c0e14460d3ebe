"""The config.json a student will have, as far as its recipe and its teacher tell before it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdistill.pipeline.stage import Planned, PreflightContext

_TEACHERS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}


def planned_config(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `lmdistill.deployment.architectures` reads of a config.json, for a student made after this teacher.

    `student` holds the student stage's keys; which layers attend is not known yet, only how many. None where the
    student comes from a checkpoint of its own, or the teacher's config.json has other words for its sizes.
    """
    if student.get("init") == "checkpoint" or "architecture" not in student:
        return None
    inherited = [name for key, name in _TEACHERS.items() if not student.get(key)]
    if not teacher.keys() >= {"vocab_size", "max_position_embeddings", *inherited}:
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
    return parameters_by(planned_config(student, teacher))


def parameters_by(config: Mapping[str, Any] | None) -> int | None:
    """How many parameters a student of this config.json has, by formula."""
    from types import SimpleNamespace

    from lmdistill.students import parameters

    return None if config is None else parameters.count(SimpleNamespace(**config))


def config_ahead(ctx: PreflightContext[Any], role: str) -> dict[str, Any] | None:
    """config.json of the model that plays `role`, where it is there or the recipe tells what it will be."""
    planned, teacher = ctx.one(role), _config_of(ctx.teacher.path if ctx.teacher else None)
    if planned.artefact is not None:
        return _config_of(planned.artefact.model().path)
    if planned.stage == "teacher":
        return teacher
    return _ahead(planned if planned.stage in _MAKERS else _student_stage(ctx), teacher)


def student_ahead(ctx: PreflightContext[Any], teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of the student that a stage is built on, made or not; of a search the largest it may choose.

    None where there is no such stage, or the student's checkpoint is not on this machine yet.
    """
    return _ahead(_student_stage(ctx), teacher)


def _student_stage(ctx: PreflightContext[Any]) -> Planned | None:
    return next((made for stage in _MAKERS if (made := ctx.ancestor(stage)) is not None), None)


def _ahead(made: Planned | None, teacher: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if made is None:
        return None
    if made.artefact is not None:
        return _config_of(made.artefact.model().path)
    if (folder := checkpoint_ahead(made.config)) is not None:
        return _whole_config(folder)
    return None if teacher is None else _MAKERS[made.stage](made.config, teacher)


def _largest(config: Any, teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    from lmdistill.search.ahead import largest

    return largest(config, teacher)


def _grown(config: Any, teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    return planned_config(config.model_dump(), teacher)


def checkpoint_ahead(student: Any) -> Path | None:
    """The model folder that a student with these keys begins from, where it is on this machine."""
    from lmdistill.assets import model_available

    source = getattr(student, "source", None)
    found = None if source is None else model_available(source)
    return None if found is None else found.path


_MAKERS = {"student": _grown, "search": _largest}


def _whole_config(folder: Path) -> dict[str, Any] | None:
    """A config.json that others wrote, with the keys that transformers fills in; None where it knows no such model."""
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).to_dict()
    except (ValueError, KeyError, OSError):
        return None
    return found


def _config_of(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config
