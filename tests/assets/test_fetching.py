"""Files from paths and wheels: identity without download, digests checked, fetched once, nothing half-written read."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lmdistill import assets
from lmdistill.asset_spec import AssetSpec
from lmdistill.assets import wheel
from lmdistill.errors import AssetError
from lmdistill.pipeline.stage import SilentProgress

CONTENT = b'{"text": "hello"}\n' * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SOURCE = "pypi:toydata==1.0/toydata/data.jsonl"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
RECORD = "toydata/data.jsonl,,\ntoydata-1.0.dist-info/METADATA,,\ntoydata-1.0.dist-info/WHEEL,,\n"


class Recorder(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[tuple[float, float]] = []

    def update(self, done: float, total: float, unit: str = "", **figures: float | str) -> None:
        self.done.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that pip takes packages from, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toydata-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toydata/data.jsonl", CONTENT)
        archive.writestr("toydata/other.txt", "other")
        archive.writestr("toydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\n")
        archive.writestr("toydata-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr("toydata-1.0.dist-info/RECORD", RECORD)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_file_of_a_wheel_is_fetched_once(index: Path) -> None:
    spec = AssetSpec(source=SOURCE, sha256=SHA256)
    assert assets.available(spec) is None
    progress = Recorder()
    path = assets.fetch(spec, progress)
    assert path.read_bytes() == CONTENT and path.is_relative_to(assets.cache_dir())
    assert progress.done[-1] == (len(CONTENT), len(CONTENT))
    (index / "toydata-1.0-py3-none-any.whl").unlink()
    assert assets.fetch(spec, SilentProgress()) == path == assets.available(spec)
    other = assets.fetch(AssetSpec(source="pypi:toydata==1.0/toydata/other.txt"), SilentProgress())
    assert other.read_text() == "other", "the kept wheel serves a second file"


def test_a_wrong_digest_is_refused_and_leaves_nothing(index: Path) -> None:
    wrong = AssetSpec(source=SOURCE, sha256="1" * 64)
    with pytest.raises(AssetError) as caught:
        assets.fetch(wrong, SilentProgress())
    for part in (SOURCE, "1" * 64, SHA256, "correct `sha256:`"):
        assert part in str(caught.value)
    assert assets.available(AssetSpec(source=SOURCE)) is None
    assert assets.fetch(AssetSpec(source=SOURCE, sha256=SHA256), SilentProgress()).read_bytes() == CONTENT


def test_a_changed_file_in_the_cache_is_refused(index: Path) -> None:
    spec = AssetSpec(source=SOURCE, sha256=SHA256)
    path = assets.fetch(spec, SilentProgress())
    path.write_bytes(CONTENT[:-1] + b" ")
    with pytest.raises(AssetError, match="not the file that the recipe asks for"):
        assets.available(spec)


def test_an_interrupted_fetch_is_taken_up(index: Path) -> None:
    """What a killed process leaves: a staging folder with half a wheel, and half a file under another name."""
    spec = AssetSpec(source=SOURCE, sha256=SHA256)
    target = wheel.member_path(spec.location)
    target.parent.mkdir(parents=True)
    target.with_name(f".{target.name}.partial").write_bytes(CONTENT[:100])
    staging = wheel.folder_of(spec.location) / "staging"
    staging.mkdir()
    (staging / "toydata-1.0-py3-none-any.whl").write_bytes(b"PK half")
    assert assets.available(spec) is None
    assert assets.fetch(spec, SilentProgress()).read_bytes() == CONTENT
    assert not staging.exists() and not list(target.parent.glob(".*"))


def test_a_damaged_wheel_is_named_and_fetched_anew(index: Path) -> None:
    spec = AssetSpec(source=SOURCE, sha256=SHA256)
    kept = wheel.folder_of(spec.location) / "wheel"
    kept.mkdir(parents=True)
    (kept / "toydata-1.0-py3-none-any.whl").write_bytes(b"not a zip")
    with pytest.raises(AssetError, match="is damaged"):
        assets.fetch(spec, SilentProgress())
    assert assets.fetch(spec, SilentProgress()).read_bytes() == CONTENT


def test_a_member_that_is_not_there_has_a_nearest(index: Path) -> None:
    with pytest.raises(AssetError, match=r"holds no file 'toydata/date\.jsonl'; did you mean 'toydata/data\.jsonl'"):
        assets.fetch(AssetSpec(source="pypi:toydata==1.0/toydata/date.jsonl"), SilentProgress())


@pytest.mark.parametrize("member", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_member_cannot_leave_the_cache(member: str) -> None:
    with pytest.raises(AssetError, match="not a path inside a wheel"):
        assets.available(AssetSpec(source=f"pypi:toydata==1.0/{member}"))


def test_a_package_that_pip_does_not_find_says_so(index: Path) -> None:
    with pytest.raises(AssetError, match=r"pip could not fetch toydata==2\.0") as caught:
        assets.fetch(AssetSpec(source="pypi:toydata==2.0/x"), SilentProgress())
    assert "No matching distribution" in str(caught.value)


def test_a_process_that_fetched_can_still_import_setuptools(index: Path) -> None:
    """As torch.compile does; it could not after `pip` had been looked up as a module."""
    code = f"""from lmdistill import assets
from lmdistill.asset_spec import AssetSpec
from lmdistill.pipeline.stage import SilentProgress
assets.fetch(AssetSpec(source={SOURCE!r}), SilentProgress())
import setuptools"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def _fetch_and_count(queue: multiprocessing.Queue[tuple[str, int]]) -> None:
    progress = Recorder()
    path = assets.fetch(AssetSpec(source=SOURCE, sha256=SHA256), progress)
    queue.put((str(path), sum("with pip" in note for note in progress.notes)))


def test_two_processes_take_turns(index: Path) -> None:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    queue: multiprocessing.Queue[tuple[str, int]] = context.Queue()
    workers = [context.Process(target=_fetch_and_count, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({path for path, _ in found}) == 1 and sum(count for _, count in found) == 1


def test_identities_need_no_download(tmp_path: Path) -> None:
    assert assets.identity(AssetSpec(source=SOURCE, sha256=SHA256)) == f"sha256:{SHA256}"
    assert assets.identity(AssetSpec(source=SOURCE)) == "pypi:toydata==1.0/toydata/data.jsonl"
    assert assets.identity(AssetSpec(source="hf:org/name@abc")) == "hf:org/name@abc"
    assert assets.identity(AssetSpec(source="hf:datasets/org/d@1/x.parquet")) == "hf:datasets/org/d@1/x.parquet"
    local = tmp_path / "data.jsonl"
    local.write_bytes(CONTENT)
    assert assets.identity(AssetSpec(source=str(local))) == f"sha256:{SHA256}"
    gguf = assets.identity(AssetSpec(source="pypi:p==1/model.gguf", sha256=SHA256))
    assert gguf.startswith(f"sha256:{SHA256}+import-v"), "another converter makes another model"


def test_a_folders_identity_follows_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    spec = AssetSpec(source=str(folder))
    first = assets.identity(spec)
    (folder / ".cache" / "note").write_text("not the model's")
    assert assets.identity(spec) == first
    (folder / "config.json").rename(folder / "other.json")
    second = assets.identity(spec)
    (folder / "other.json").write_text("{ }")
    assert len({first, second, assets.identity(spec)}) == 3


def test_a_remembered_digest_follows_the_file(tmp_path: Path) -> None:
    """Old enough to be remembered, then changed with the same size: the time of change tells."""
    path = tmp_path / "data.bin"
    path.write_bytes(b"aaaa")
    os.utime(path, (1_000_000, 1_000_000))
    spec = AssetSpec(source=str(path))
    first = assets.identity(spec)
    assert assets.identity(spec) == first
    assert len(list((assets.cache_dir() / "digests").iterdir())) == 1
    path.write_bytes(b"bbbb")
    assert assets.identity(spec) == f"sha256:{hashlib.sha256(b'bbbb').hexdigest()}"


def test_local_files_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(CONTENT)
    assert assets.fetch(AssetSpec(source=str(path), sha256=SHA256), SilentProgress()) == path
    with pytest.raises(AssetError, match="not the file that the recipe asks for"):
        assets.fetch(AssetSpec(source=str(path), sha256="2" * 64), SilentProgress())


def test_a_cache_that_cannot_be_written_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="set LMDISTILL_CACHE"):
        assets.fetch(AssetSpec(source="pypi:toydata==1.0/x"), SilentProgress())
