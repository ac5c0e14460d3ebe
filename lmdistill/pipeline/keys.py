"""What makes an artefact what it is: a stage's key, and its sha256, the fingerprint.

The key holds the stage and its version, the semantic configuration (no field marked `RuntimeKey`, none marked
`AddedKey` that has its default, assets by identity),
the inputs' fingerprints, the teacher's identity and the versions of tools that change the bytes. No path, device or
speed is in it, nor a stage's name, unless the stage writes names into its output.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import AddedKey, Planned, RuntimeKey, Stage, StageConfig

Identity = Callable[[AssetSpec], str]
SHORT = 12  # characters of a fingerprint in a folder's name


def is_runtime(metadata: Sequence[Any], annotation: Any) -> bool:
    """Whether a field is marked `RuntimeKey`, at its top or inside a union."""
    if any(isinstance(mark, RuntimeKey) for mark in metadata):
        return True
    return any(is_runtime(getattr(part, "__metadata__", ()), part) for part in get_args(annotation))


def _as_before(info: FieldInfo, value: Any) -> bool:
    """Whether a field marked `AddedKey` has its default, so that results made before it was added stay valid."""
    return any(isinstance(mark, AddedKey) for mark in info.metadata) and bool(value == info.default)


def semantic(value: Any, identity: Identity) -> Any:
    """`value` as plain JSON without runtime keys; assets and paths are replaced by the identity of their content."""
    if isinstance(value, AssetSpec):
        fields = {k: info for k, info in type(value).model_fields.items() if k not in AssetSpec.model_fields}
        own = {k: semantic(v, identity) for k, v in value if k in fields and not _as_before(fields[k], v)}
        return {"asset": identity(value), **own}
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: semantic(getattr(value, name), identity)
            for name, info in fields.items()
            if not is_runtime(info.metadata, info.annotation) and not _as_before(info, getattr(value, name))
        }
    if isinstance(value, Mapping):
        return {str(k): semantic(v, identity) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((semantic(v, identity) for v in value), key=canonical)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [semantic(v, identity) for v in value]
    if isinstance(value, Path):
        return {"asset": identity(AssetSpec(source=str(value)))}
    return value.value if isinstance(value, Enum) else value


def assets_in(value: Any) -> list[AssetSpec]:
    """Every asset that a configuration names, in order."""
    if isinstance(value, AssetSpec):
        return [value]
    if isinstance(value, BaseModel):
        return [asset for _, inner in value for asset in assets_in(inner)]
    if isinstance(value, Mapping):
        return [asset for inner in value.values() for asset in assets_in(inner)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [asset for inner in value for asset in assets_in(inner)]
    return []


def canonical(value: Any) -> str:
    """JSON that is the same for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(key: Mapping[str, Any]) -> str:
    """The sha256 of a stage's key, as hex."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()


def stage_key(
    stage: Stage[Any],
    name: str,
    config: StageConfig,
    inputs: Mapping[str, Sequence[Planned]],
    teacher: str | None,
    tools: Mapping[str, str],
    identity: Identity,
) -> dict[str, Any]:
    """The key of one stage; `teacher` is the identity of the recipe's teacher, taken where the stage uses it."""
    many = {role.role for role in stage.inputs if role.many}
    named = {role for role in inputs if stage.uses_names or role in many}
    key: dict[str, Any] = {
        "stage": stage.name,
        "version": stage.version,
        "config": semantic(config, identity),
        "inputs": {
            role: [[one.name, one.fingerprint] if role in named else one.fingerprint for one in planned]
            for role, planned in inputs.items()
        },
        "tools": dict(tools),
    }
    if stage.uses_teacher(config):
        key["teacher"] = teacher
    if stage.uses_names:
        key["name"] = name
    return key


@functools.cache
def tool_versions(tools: tuple[str, ...], python: str = sys.executable) -> dict[str, str]:
    """Distribution → version, as the interpreter that runs the stage sees them; `absent` where it is not there."""
    if python == sys.executable:
        return {tool: _version(tool) for tool in tools}
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({t: have.get(t.lower().replace('_', '-'), 'absent') for t in sys.argv[1:]}))"
    )
    try:
        found = subprocess.run([python, "-c", code, *tools], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(error)
        raise PreflightError(f"{python} is no usable Python", why=why, fix="correct runtime.python") from error
    versions: dict[str, str] = json.loads(found.stdout)
    return versions


def _version(tool: str) -> str:
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
