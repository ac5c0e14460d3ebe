"""What goes between the pipeline and its worker processes, as JSON: plans, artefacts, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill import errors
from lmdistill.errors import LmdistillError, StageError
from lmdistill.pipeline.launch_keys import LaunchSection
from lmdistill.pipeline.stage import Artefact, Estimate, ModelRef, Planned, Runtime, StageConfig
from lmdistill.stages import load_stage, stage_files

Json = dict[str, Any]


def artefact_to_json(artefact: Artefact) -> Json:
    """An artefact with its absolute path."""
    return dataclasses.asdict(artefact) | {"path": str(artefact.path.absolute())}


def artefact_from_json(data: Json) -> Artefact:
    """The inverse of `artefact_to_json`."""
    return Artefact(**(data | {"path": Path(data["path"])}))


def model_to_json(model: ModelRef | None) -> Json | None:
    """A checkpoint reference, or None."""
    if model is None:
        return None
    return dataclasses.asdict(model) | {"path": str(model.path), "gguf": str(model.gguf) if model.gguf else None}


def model_from_json(data: Json | None) -> ModelRef | None:
    """The inverse of `model_to_json`."""
    if data is None:
        return None
    return ModelRef(**(data | {"path": Path(data["path"]), "gguf": Path(data["gguf"]) if data["gguf"] else None}))


def runtime_from_json(data: Json) -> Runtime:
    """The runtime section as stages see it."""
    launch = data.get("launch")
    return Runtime(**(data | {"launch": LaunchSection.model_validate(launch) if launch else None}))


def planned_to_json(planned: Sequence[Planned]) -> list[Json]:
    """Planned stages in their order; inputs by name."""
    return [
        {
            "name": one.name,
            "stage": one.stage,
            "kind": one.kind,
            "fingerprint": one.fingerprint,
            "config": one.config.model_dump(mode="json", by_alias=True),
            "inputs": {role: [each.name for each in many] for role, many in one.inputs.items()},
            "artefact": artefact_to_json(one.artefact) if one.artefact else None,
        }
        for one in planned
    ]


def planned_from_json(data: Sequence[Json]) -> dict[str, Planned]:
    """The inverse of `planned_to_json`, by name."""
    made: dict[str, Planned] = {}
    for one in data:
        inputs = {role: [made[name] for name in names] for role, names in one["inputs"].items()}
        artefact = artefact_from_json(one["artefact"]) if one["artefact"] else None
        config = config_of(one["stage"], one["config"])
        made[one["name"]] = Planned(
            one["name"], one["stage"], one["kind"], one["fingerprint"], config, inputs, artefact
        )
    return made


def config_of(stage: str, data: Mapping[str, Any]) -> StageConfig:
    """A stage's configuration; the teacher, which is no stage, has an empty one."""
    return load_stage(stage).Config.model_validate(data) if stage in stage_files() else StageConfig()


def estimate_from_json(data: Json) -> Estimate:
    """What a stage said that it will cost."""
    return Estimate(**data)


def error_to_json(error: LmdistillError) -> Json:
    """An error's class and its parts."""
    return {"class": type(error).__name__, "what": error.what, "why": error.why, "fix": error.fix}


def error_from_json(data: Json) -> LmdistillError:
    """The same error on the other side; a class that lmdistill.errors lacks becomes a StageError."""
    kind = getattr(errors, data["class"], StageError)
    error: LmdistillError = kind(data["what"], why=data["why"], fix=data["fix"])
    return error
