"""Assets as model folders in Hugging Face layout; a GGUF is converted once and kept in the cache."""

from __future__ import annotations

import json
from pathlib import Path

from lmdistill.asset_spec import AssetSpec
from lmdistill.assets.cache import cache_dir, locked, sha256_of
from lmdistill.assets.fetching import CONVERTER_VERSION, available, fetch, identity
from lmdistill.assets.hub import PLACEMENT
from lmdistill.errors import AssetError, IntegrityError
from lmdistill.pipeline.stage import ModelRef, Progress


def model_available(spec: AssetSpec) -> ModelRef | None:
    """The model where it is on this machine and ready to load, else None; never downloads or converts."""
    path = available(spec)
    if path is None:
        return None
    if path.is_file():
        folder = _converted(path)
        return _reference(spec, _unchanged(folder), gguf=path) if folder.exists() else None
    return _reference(spec, _usable(path, spec))


def model_folder(spec: AssetSpec, progress: Progress) -> ModelRef:
    """Bring the model to this machine as a folder with safetensors, config, tokenizer and chat template.

    A GGUF becomes f32 safetensors with a tokenizer proven against llama.cpp's for the same file.
    Raises AssetError where the asset is no model, IntegrityError where the tokenizers differ.
    """
    path = fetch(spec, progress)
    if not path.is_file():
        return _reference(spec, _usable(path, spec))
    if path.suffix != ".gguf":
        raise AssetError(
            f"{spec.source} is not a model", why="a model is a folder in Hugging Face layout or a GGUF file"
        )
    folder = _converted(path)
    with locked(str(folder), progress):
        if not folder.exists():
            from lmdistill.teachers.gguf_import import import_gguf

            import_gguf(path, folder, progress)
    return _reference(spec, _unchanged(folder), gguf=path)


def tokenizer_folder(spec: AssetSpec, progress: Progress) -> Path:
    """Bring the asset's tokenizer and chat template to this machine; a folder needs no model beside them."""
    path = fetch(spec, progress)
    found = path if path.is_dir() else model_folder(spec, progress).path
    if not (found / "tokenizer.json").exists():
        raise AssetError(f"{spec.source} has no tokenizer.json", why="only fast tokenizers are read")
    return found


def _converted(gguf: Path) -> Path:
    return cache_dir() / "models" / f"{sha256_of(gguf)}-v{CONVERTER_VERSION}"


def _unchanged(folder: Path) -> Path:
    """A converted `folder`, if its files are those that import.json lists; a file is read again only where it changed.

    Raises IntegrityError naming the first file that differs.
    """
    fix = f"delete {folder} and run again: it is converted anew"
    try:
        listed = json.loads((folder / "import.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{folder}/import.json cannot be read", why=str(error), fix=fix) from error
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", why="import.json lists it", fix=fix)
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise IntegrityError(f"{path} was changed", why="import.json has another size or sha256 of it", fix=fix)
    return folder


def _reference(spec: AssetSpec, folder: Path, gguf: Path | None = None) -> ModelRef:
    name = spec.location.name.rstrip("/").rsplit("/", 1)[-1]
    return ModelRef(name=name, path=folder, digest=identity(spec), source=spec.source, gguf=gguf)


def _usable(folder: Path, spec: AssetSpec) -> Path:
    """`folder`, if it can be read as a model without running code or unpickling anything."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).exists()]
    if missing:
        raise AssetError(f"{spec.source} is not a usable model folder", why=f"it has no {' and no '.join(missing)}")
    if not any(folder.glob("*.safetensors")):
        raise AssetError(
            f"{spec.source} has no safetensors weights",
            why="pickled weights (.bin, .pt) are never loaded",
            fix="convert them: load with transformers where you trust them, then save_pretrained",
        )
    if len(there := [name for name in PLACEMENT if (folder / name).exists()]) == 1:
        raise AssetError(
            f"{spec.source} is not a usable model folder",
            why=f"of the record where its weights lie it has {there[0]} alone",
            fix=f"bring {' and '.join(PLACEMENT)}; with neither it is a model in full precision like any other",
        )
    return folder
