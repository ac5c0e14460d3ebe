"""The rows of the ladder: the teacher, every student and model, every file made of them, and who is whose parent."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmdistill.checkpoints import stored_tensors
from lmdistill.deployment.targets import targets
from lmdistill.errors import IntegrityError, StageError
from lmdistill.evaluation.pairs import is_baseline, training_record
from lmdistill.pipeline.stage import Artefact, ModelRef

Role = Literal["teacher", "baseline", "student", "file"]
TEACHER = "teacher"
CHECKPOINT_RUNTIME = "transformers"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Subject:
    """One row of the ladder before it is measured."""

    name: str
    role: Role
    runtime: str
    format: str
    path: Path  # a checkpoint folder or a file
    parent: str | None  # the row it is compared with; None for the teacher
    params: int
    file_bytes: int
    fallback_share: float | None = None  # of a file's weights, in wider types than its format's name says
    note: str = ""  # how a file came about, where that is out of the ordinary


def checkpoint(name: str, role: Role, folder: Path, parent: str | None) -> Subject:
    """The row of a checkpoint folder; raises IntegrityError where it holds no safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise IntegrityError(f"no model.safetensors in {folder}", fix="run the stage that makes it again")
    dtypes, shapes = zip(*stored_tensors(folder), strict=True)
    dtype = max(sorted(set(dtypes)), key=dtypes.count)
    return Subject(
        name,
        role,
        CHECKPOINT_RUNTIME,
        DTYPES.get(dtype, dtype.lower()),
        folder,
        parent,
        params=sum(math.prod(shape) for shape in shapes),
        file_bytes=sum(file.stat().st_size for file in files),
    )


def _files(deployment: Artefact, parents: dict[str, Subject]) -> list[Subject]:
    record = json.loads((deployment.out / "deployment.json").read_text())
    digest, made_from = record["model"]["digest"], record["model"]["name"]
    parent = parents.get(digest)
    if parent is None:
        raise StageError(
            f"the files of '{deployment.name}' come from '{made_from}', which is not evaluated",
            fix=f"add '{made_from}' to evaluate's `from:`, or leave `from:` out",
        )
    runtimes = {target.suffix: target.runtime for target in targets().values()}
    subjects = []
    for entry in record["files"]:
        path = deployment.out / entry["file"]
        if path.suffix in runtimes:
            row = f"{deployment.name}/{entry['format']}"
            size, runtime = path.stat().st_size, runtimes[path.suffix]
            share, note = entry.get("fallback_share"), entry.get("note", "")
            subjects.append(
                Subject(row, "file", runtime, entry["format"], path, parent.name, parent.params, size, share, note)
            )
    return subjects


def assemble(teacher: ModelRef, models: Sequence[Artefact], deployments: Sequence[Artefact]) -> list[Subject]:
    """Every row, each parent directly followed by its files: teacher, then students and models in recipe order."""
    top = checkpoint(TEACHER, "teacher", teacher.path, None)
    parents = {teacher.digest: top}
    for model in models:
        if model.fingerprint in parents:  # the teacher, named in `from:`
            continue
        role: Role = "baseline" if is_baseline(training_record(model)) else "student"
        parents[model.fingerprint] = checkpoint(model.name, role, model.model().path, TEACHER)
    files = [file for deployment in deployments for file in _files(deployment, parents)]
    return [
        row for parent in parents.values() for row in (parent, *(file for file in files if file.parent == parent.name))
    ]
