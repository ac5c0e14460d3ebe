"""Repositories on the Hugging Face hub: `hf:org/name@revision`, `hf:datasets/org/name@revision[/file]`.

Only safetensors, configs, tokenizers and data files are taken; pickled weights never are. Files go to
$HF_HUB_CACHE or $HF_HOME where those are set, else below lmdistill's cache folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lmdistill.asset_spec import Location
from lmdistill.assets.cache import cache_dir, need_disk, write_text
from lmdistill.errors import AssetError
from lmdistill.pipeline.stage import Progress

MODEL_PATTERNS = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json"]
MODEL_PATTERNS += ["tokenizer*.json", "special_tokens_map.json", "chat_template.jinja"]
PLACEMENT = ("grids/grids.json", "grids/scales.safetensors")  # where the weights of a model lie
MODEL_PATTERNS += PLACEMENT
DATA_PATTERNS = ["*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.json", "*.txt", "README.md"]


def patterns_for(location: Location) -> list[str]:
    """Which files of a repository are wanted."""
    if location.member:
        return [location.member]
    return DATA_PATTERNS if location.dataset else MODEL_PATTERNS


def identity_of(location: Location) -> str:
    """The asset's name in fingerprints: repository, revision, file."""
    member = f"/{location.member}" if location.member else ""
    return f"hf:{'datasets/' if location.dataset else ''}{location.name}@{location.version}{member}"


def snapshot(location: Location) -> Path | None:
    """What an earlier fetch brought: the folder, or the named file; None where it is not there."""
    try:
        kept = json.loads(_receipt(location).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    folder = Path(kept["folder"])
    if len({(folder / name).exists() for name in PLACEMENT}) > 1:
        return None  # one without the other says nothing: fetched anew
    return _pick(folder, location) if all((folder / name).exists() for name in kept["files"]) else None


def fetch_snapshot(location: Location, progress: Progress) -> Path:
    """Bring a repository's wanted files, or the named one, to this machine; the caller holds the asset's lock."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    source = identity_of(location)
    wanted: dict[str, Any] = {"repo_id": location.name, "repo_type": "dataset" if location.dataset else "model"}
    wanted["cache_dir"] = _hub_cache()
    patterns = patterns_for(location)
    try:
        if HF_HUB_OFFLINE:
            folder = Path(
                huggingface_hub.snapshot_download(
                    **wanted, revision=location.version, allow_patterns=patterns, local_files_only=True
                )
            )
        else:
            folder = _download(wanted, location, patterns, progress)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AssetError(
            f"cannot fetch {source}",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="check the name and revision, the network, HF_TOKEN for a gated repository, and HF_HUB_OFFLINE",
        ) from error
    files = sorted(str(p.relative_to(folder).as_posix()) for pattern in patterns for p in folder.rglob(pattern))
    if not files:
        raise AssetError(f"{source} has none of the files that are needed", why=f"looked for {', '.join(patterns)}")
    write_text(_receipt(location), json.dumps({"folder": str(folder), "files": files}))
    return _pick(folder, location)


def _download(wanted: dict[str, Any], location: Location, patterns: list[str], progress: Progress) -> Path:
    """File by file, so that progress is told; finished files are not fetched again."""
    import huggingface_hub

    files = huggingface_hub.snapshot_download(
        **wanted, revision=location.version, allow_patterns=patterns, dry_run=True
    )
    if not files:
        raise ValueError(f"no file matches {', '.join(patterns)}")
    commit = files[0].commit_hash
    total = sum(file.file_size for file in files)
    if commit != location.version:
        progress.note(f"{identity_of(location)} is commit {commit}; name the commit in the recipe to pin it")
    need_disk(cache_dir(), sum(file.file_size for file in files if file.will_download), identity_of(location))
    done = 0
    for file in files:
        huggingface_hub.hf_hub_download(**wanted, revision=commit, filename=file.filename)
        done += file.file_size
        progress.update(done, total, "bytes")
    return Path(
        huggingface_hub.snapshot_download(**wanted, revision=commit, allow_patterns=patterns, local_files_only=True)
    )


def _hub_cache() -> Path | None:
    """None leaves the choice to huggingface_hub, where the user has made one."""
    if os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME"):
        return None
    return cache_dir() / "hub"


def _receipt(location: Location) -> Path:
    name = identity_of(location).removeprefix("hf:").replace("/", "--")
    return cache_dir() / "receipts" / f"{name}.json"


def _pick(folder: Path, location: Location) -> Path:
    """The named file; the folder where none is named or the name is a pattern."""
    return folder / location.member if location.member and "*" not in location.member else folder
