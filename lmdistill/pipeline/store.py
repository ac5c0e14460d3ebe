"""Artefacts on disk: `NN-name-<fp12>/` when finished, `.partial-name-<fp12>/` while being made.

A finished folder appears by one rename, after every file in it is durable and its manifest is written. It is found
by its fingerprint, whatever its number and name, so that a recipe whose stages move or are renamed finds its work.
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.pipeline import origins
from lmdistill.pipeline.files import fsync, fsync_tree, sha256_file, write_json
from lmdistill.pipeline.keys import SHORT, fingerprint
from lmdistill.pipeline.stage import Artefact

ASIDE = ".replaced-"  # before the name of a finished folder while it is made again
LOCK = "work.lock"  # held by the process that works in a partial folder


@dataclass(frozen=True)
class Store:
    """The artefacts of one run folder."""

    root: Path

    def find(self, name: str, stage: str, kind: str, key: Mapping[str, Any]) -> Artefact | None:
        """The finished artefact with this key, under the name it has now; None where there is none, or not all of it.

        Raises IntegrityError where a folder of that fingerprint has lost its key or its manifest.
        """
        folder = self.folder(key)
        if folder is None or missing_files(folder):
            return None
        return Artefact(name, stage, kind, fingerprint(key), folder)

    def folder(self, key: Mapping[str, Any]) -> Path | None:
        """The finished folder with this key, whether or not all its files are still there."""
        full = fingerprint(key)
        for folder in sorted(self.root.glob(f"[0-9]*-{full[:SHORT]}")):
            found = read_key(folder)
            if not found:
                raise IntegrityError(f"{folder}/key.json cannot be read", fix=_again(folder))
            if found["fingerprint"] == full:
                return folder
        return None

    def finished(self) -> Iterator[Path]:
        """Every finished folder, newest first."""
        folders = [folder for folder in self.root.glob("[0-9]*-*") if (folder / "manifest.json").is_file()]
        return iter(sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True))

    def partial(self, name: str, key: Mapping[str, Any]) -> Path:
        """The folder in which the artefact with this key is being made, or would be."""
        short = fingerprint(key)[:SHORT]
        found = sorted(self.root.glob(f".partial-*-{short}"))
        return found[0] if found else self.root / f".partial-{name}-{short}"

    def begin(self, name: str, key: Mapping[str, Any], made_from: origins.Contents) -> Path:
        """Open the partial folder; what an interrupted run left in it stays, but for half-written `*.tmp` files.

        `made_from` are the contents of its inputs: what was begun from others goes.
        """
        folder = self.partial(name, key)
        if origins.others(folder, made_from):
            shutil.rmtree(folder)
        (folder / "out").mkdir(parents=True, exist_ok=True)
        (folder / "work").mkdir(exist_ok=True)
        for leftover in (folder / "out").rglob("*.tmp"):
            leftover.unlink()
        origins.keep(folder, made_from)
        write_json(folder / "key.json", {"name": name, "fingerprint": fingerprint(key), "key": key})
        return folder

    def reopen(self, name: str, key: Mapping[str, Any], made_from: origins.Contents) -> dict[str, Any] | None:
        """Turn a finished folder that lacks files into a partial one, so that its stage makes what is missing.

        Returns the manifest it had, which the stage should come to again; None where there is no such folder, or it
        was made from other bytes of its inputs.
        """
        folder, partial = self.folder(key), self.partial(name, key)
        if folder is None or partial.exists() or origins.others(folder, made_from) or not missing_files(folder):
            return None
        before = read_manifest(folder)
        folder.rename(partial)
        (partial / "manifest.json").unlink()
        return before

    def publish(self, partial: Path, number: int, name: str, result: Mapping[str, Any], seconds: float) -> Path:
        """Turn a partial folder into a finished one and return it.

        `result` holds the stage's `metrics`; seconds, host and the like go to run.json, which no digest covers.
        """
        out, short = partial / "out", partial.name.rsplit("-", 1)[1]
        fsync_tree(out)
        metrics = result["metrics"]
        files = {
            path.relative_to(out).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run = {"seconds": round(seconds, 3), "finished": now, "host": platform.node(), "resumed": result["resumed"]}
        if result["peak_rss_bytes"] is not None:  # of the process that finished it: a resumed one says less
            run["peak_rss_bytes"] = result["peak_rss_bytes"]
        if isinstance(metrics.get("tokens"), int):
            run["tokens"] = metrics["tokens"]
        write_json(partial / "run.json", run)
        write_json(partial / "manifest.json", {"files": files, "metrics": metrics})
        return self.finish(partial, number, name, short)

    def finish(self, partial: Path, number: int, name: str, short: str) -> Path:
        """The last steps of `publish`, which a run that was killed between them takes up again."""
        shutil.rmtree(partial / "work", ignore_errors=True)
        (partial / LOCK).unlink(missing_ok=True)
        fsync(partial)
        final = self.root / f"{number:02d}-{name}-{short}"
        own = read_key(partial)
        for stale in self.root.glob(f"[0-9]*-{short}"):  # of the same key, made from other bytes of its inputs
            if read_key(stale).get("fingerprint") == own["fingerprint"]:
                shutil.rmtree(stale)
        partial.rename(final)
        fsync(self.root)
        return final

    def set_aside(self, artefact: Artefact) -> Path:
        """Move a finished folder away, so that it can be made again and compared."""
        aside = self.root / f"{ASIDE}{artefact.path.name}"
        if aside.exists():
            shutil.rmtree(aside)
        artefact.path.rename(aside)
        return aside

    def put_back(self) -> None:
        """Undo every `set_aside` whose artefact was not made again; where it was, the old one goes."""
        for aside in self.root.glob(f"{ASIDE}*"):
            short = aside.name.rsplit("-", 1)[1]
            if any(self.root.glob(f"[0-9]*-{short}")):
                shutil.rmtree(aside)
                continue
            for partial in self.root.glob(f".partial-*-{short}"):
                shutil.rmtree(partial)
            aside.rename(self.root / aside.name.removeprefix(ASIDE))


def read_key(folder: Path) -> dict[str, Any]:
    """key.json of a finished or partial folder: name, fingerprint, key; empty where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a finished folder; IntegrityError where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder}/manifest.json cannot be read", why=str(error), fix=_again(folder)) from error
    return found


def missing_files(folder: Path) -> list[Path]:
    """The files that a finished folder's manifest lists and that are not there."""
    listed = [folder / "out" / name for name in read_manifest(folder)["files"]]
    return [path for path in listed if not path.is_file()]


def check(folder: Path, *, digests: bool) -> None:
    """Compare a finished folder with its manifest: existence and size, and with `digests` every file's sha256.

    Raises IntegrityError naming the first file that differs.
    """
    for name, entry in read_manifest(folder)["files"].items():
        path, fix = folder / "out" / name, "give the same command: what is missing is made again, the rest is kept"
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", why="the manifest lists it", fix=fix)
        if path.stat().st_size != entry["bytes"]:
            why = f"it has {path.stat().st_size} bytes, and had {entry['bytes']} when it was made"
            raise IntegrityError(f"{path} was changed", why=why, fix=f"delete {path} and {fix}")
        if digests and sha256_file(path) != entry["sha256"]:
            why = f"its sha256 is not {entry['sha256']}, which it was when it was made"
            raise IntegrityError(f"{path} was changed", why=why, fix=f"delete {path} and {fix}")


def _again(folder: Path) -> str:
    return f"delete {folder} and give the same command: it is made again"
