"""Models as assets: a GGUF becomes a folder once, a folder is taken as it is, anything else is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdistill import assets
from lmdistill.asset_spec import AssetSpec
from lmdistill.assets.cache import sha256_of
from lmdistill.assets.fetching import CONVERTER_VERSION
from lmdistill.checkpoints import load_model, load_tokenizer
from lmdistill.errors import AssetError, IntegrityError
from lmdistill.pipeline.stage import SilentProgress


def test_the_imported_teacher_is_whole_and_speaks(teacher_folder: Path, embedded_gguf: Path) -> None:
    import torch

    manifest = json.loads((teacher_folder / "import.json").read_text())
    assert manifest["source_sha256"] == sha256_of(embedded_gguf) and manifest["probes"] >= 1000
    for name, kept in manifest["files"].items():
        with (teacher_folder / name).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == kept["sha256"], name
    assert (teacher_folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    model, tokenizer = load_model(teacher_folder), load_tokenizer(teacher_folder)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def test_a_converted_model_is_found_again(
    teacher_folder: Path, embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = AssetSpec(source=str(embedded_gguf))
    found = assets.model_available(spec)
    assert found is not None and found.path == teacher_folder and found.digest == assets.identity(spec)
    monkeypatch.setattr("lmdistill.teachers.gguf_import.import_gguf", None)  # not called again
    assert assets.model_folder(spec, SilentProgress()) == found


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_failed_import_leaves_nothing_to_read(
    own_cache: Path, embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = AssetSpec(source=str(embedded_gguf))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmdistill.teachers.gguf_import._write_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        assets.model_folder(spec, SilentProgress())
    assert assets.model_available(spec) is None
    assert [path.name.endswith(".partial") for path in (own_cache / "models").iterdir()] == [True]


def test_a_converted_folder_is_held_against_its_record(own_cache: Path, tmp_path: Path) -> None:
    """Whole it is found; with one bit turned or a file lost it is refused, and the message says what to delete."""
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    folder = own_cache / "models" / f"{sha256_of(gguf)}-v{CONVERTER_VERSION}"
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    kept = {"bytes": 7, "sha256": sha256_of(weights)}
    (folder / "import.json").write_text(json.dumps({"files": {weights.name: kept}}))
    spec = AssetSpec(source=str(gguf))
    found = assets.model_available(spec)
    assert found is not None and found.path == folder
    weights.write_bytes(b"weightr")
    with pytest.raises(IntegrityError, match=rf"(?s)model\.safetensors was changed.*delete {folder}"):
        assets.model_available(spec)
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors is missing"):
        assets.model_folder(spec, SilentProgress())


def test_a_folder_is_a_model_as_it_is(own_cache: Path, toy_llama: Callable[..., Path]) -> None:
    folder = toy_llama(num_hidden_layers=1)
    spec = AssetSpec(source=str(folder))
    reference = assets.model_folder(spec, SilentProgress())
    assert reference.path == folder and reference == assets.model_available(spec)
    assert assets.tokenizer_folder(spec, SilentProgress()) == folder


@pytest.mark.parametrize(
    ("removed", "why"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer.json"), ("model.safetensors", "never loaded")],
)
def test_a_folder_that_lacks_something_is_refused(own_cache: Path, tmp_path: Path, removed: str, why: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        if name != removed:
            (folder / name).write_text("{}")
    for use in (assets.model_available, lambda spec: assets.model_folder(spec, SilentProgress())):
        with pytest.raises(AssetError, match=why):
            use(AssetSpec(source=str(folder)))


@pytest.mark.parametrize("there", ["grids/scales.safetensors", "grids/grids.json"])
def test_half_of_the_record_where_weights_lie_is_refused(own_cache: Path, tmp_path: Path, there: str) -> None:
    """A model that was trained on a grid would be taken for one in full precision."""
    (tmp_path / "grids").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", there):
        (tmp_path / name).write_text("{}")
    with pytest.raises(AssetError, match=f"it has {there} alone"):
        assets.model_available(AssetSpec(source=str(tmp_path)))
    for name in ("grids/scales.safetensors", "grids/grids.json"):
        (tmp_path / name).write_text("{}")
    assert assets.model_available(AssetSpec(source=str(tmp_path))) is not None


def test_a_data_file_is_no_model(own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(AssetError, match="is not a model"):
        assets.model_folder(AssetSpec(source=str(tmp_path / "data.jsonl")), SilentProgress())


def test_a_file_that_is_no_gguf_is_refused(own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(AssetError, match=r"model\.gguf is not a readable GGUF"):
        assets.model_folder(AssetSpec(source=str(tmp_path / "model.gguf")), SilentProgress())


def test_too_little_disk_is_told_before_converting(
    own_cache: Path, embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=400_000_000))
    with pytest.raises(AssetError, match="too little disk") as caught:
        assets.model_folder(AssetSpec(source=str(embedded_gguf)), SilentProgress())
    assert "0.5 GB" in str(caught.value) and "LMDISTILL_CACHE" in str(caught.value)
