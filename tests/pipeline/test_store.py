"""The store: what is published is what is found, and damaged records are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.files import sha256_file, write_json
from lmdistill.pipeline.keys import fingerprint
from lmdistill.pipeline.store import Store, check

KEY = {"stage": "x", "config": {"a": 1}}


def publish(root: Path, content: bytes = b"content") -> Path:
    store = Store(root)
    partial = store.begin("x", KEY, {})
    (partial / "out" / "deep").mkdir()
    (partial / "out" / "deep" / "file.bin").write_bytes(content)
    (partial / "work" / "state").write_text("scratch")
    return store.publish(partial, 3, "x", {"metrics": {"loss": 0.5}, "resumed": False, "peak_rss_bytes": None}, 1.0)


def test_publish_and_find(tmp_path: Path) -> None:
    final = publish(tmp_path)
    assert final.name == f"03-x-{fingerprint(KEY)[:12]}"
    assert json.loads((final / "manifest.json").read_text()) == {
        "files": {"deep/file.bin": {"bytes": 7, "sha256": sha256_file(final / "out/deep/file.bin")}},
        "metrics": {"loss": 0.5},
    }
    assert not (final / "work").exists()
    found = Store(tmp_path).find("other name", "x", "kind", KEY)
    assert found is not None
    assert (found.path, found.name, found.metrics) == (final, "other name", {"loss": 0.5})
    assert Store(tmp_path).find("x", "x", "kind", KEY | {"config": {}}) is None


def test_manifest_is_the_same_for_the_same_bytes(tmp_path: Path) -> None:
    one, two = publish(tmp_path / "a"), publish(tmp_path / "b")
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()
    assert (one / "key.json").read_bytes() == (two / "key.json").read_bytes()


def test_partial_is_found_under_an_earlier_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.begin("old", KEY, {}) == store.partial("new", KEY)


@pytest.mark.parametrize("position", [0, 3, 6])
@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_bit_is_found_by_digest(tmp_path: Path, position: int, bit: int) -> None:
    final = publish(tmp_path)
    file = final / "out/deep/file.bin"
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)
    check(final, digests=False)
    with pytest.raises(IntegrityError, match=r"deep/file\.bin was changed"):
        check(final, digests=True)


def test_unreadable_records_are_named(tmp_path: Path) -> None:
    final = publish(tmp_path)
    (final / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be read"):
        check(final, digests=False)
    (final / "key.json").write_text("")
    with pytest.raises(IntegrityError, match=r"key\.json cannot be read"):
        Store(tmp_path).find("x", "x", "kind", KEY)


def test_json_without_finite_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("inf")})
    assert not (tmp_path / "x.json").exists()
