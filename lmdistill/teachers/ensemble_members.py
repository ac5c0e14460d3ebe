"""The teachers of an ensemble as a recipe names them: checked, brought here, told to the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from lmdistill.asset_spec import AssetSpec
from lmdistill.pipeline.stage import ModelRef, Progress
from lmdistill.signals.format import MemberInfo, TeacherInfo
from lmdistill.teachers.ensemble import normalised
from lmdistill.teachers.token_maps import check_same_tokens, token_map

Precision = Callable[[ModelRef], str]  # what the engine scores a teacher in


def check_members(teacher: ModelRef, others: Sequence[ModelRef]) -> None:
    """Raise PreflightError listing the ids that stand for other tokens in a member than in the recipe's teacher."""
    ours = token_map(teacher.path) if others else {}
    for other in others:
        check_same_tokens(
            ours,
            token_map(other.path),
            f"the teacher {teacher.source}",
            f"the ensemble's {other.source}",
            fix="average teachers of one vocabulary: drop this one from `ensemble`",
        )


def members_here(specs: Sequence[AssetSpec]) -> list[ModelRef]:
    """Those that are on this machine already, ready to load."""
    from lmdistill.assets import model_available

    return [model for spec in specs if (model := model_available(spec)) is not None]


def bring_members(specs: Sequence[AssetSpec], progress: Progress) -> list[ModelRef]:
    """All of them as model folders; what the pipeline has fetched is found in the cache."""
    from lmdistill.assets import model_folder

    return [model_folder(spec, progress) for spec in specs]


def ensemble_info(
    models: Sequence[ModelRef], weights: Sequence[float], precision: Precision, engine: str, version: str
) -> TeacherInfo:
    """Who spoke: every member, and one digest over all of them and their weights."""
    members = tuple(
        MemberInfo(model.lasting_source, model.digest, precision(model), weight)
        for model, weight in zip(models, normalised(weights, len(models)), strict=True)
    )
    listing = [[member.digest, member.weight] for member in members]
    return TeacherInfo(
        source=f"mean of {', '.join(member.source for member in members)}",
        digest=f"sha256:{hashlib.sha256(json.dumps(listing).encode()).hexdigest()}",
        precision=", ".join(dict.fromkeys(member.precision for member in members)),
        engine=engine,
        engine_version=version,
        members=members,
    )
