"""Repositories on a hub, here a small one on this machine: what is taken, kept, refused; offline use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "c" * 40
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {"vocab": {}}}',
    "model.safetensors": b"weights",
    "grids/grids.json": b"{}",
    "grids/scales.safetensors": b"scales",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
}

CLIENT = """
import json, sys
from lmdistill import assets
from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import SilentProgress
spec = AssetSpec(source=sys.argv[1])
try:
    before = assets.available(spec)
    path = assets.fetch(spec, SilentProgress())
    files = [p for p in path.rglob("*") if p.is_file()]
    names = sorted(p.relative_to(path).as_posix() for p in files) if path.is_dir() else [path.name]
    print(json.dumps([before is not None, names]))
except LmdistillError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers that huggingface_hub needs."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/name/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in FILES.items()]
            siblings = [{"rfilename": name} for name in FILES]
            found = tree if "/tree/" in path else {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(found).encode(), body)
        name = unquote(path.removeprefix("/org/name/resolve/").partition("/")[2])
        if path.startswith("/org/name/resolve/") and name in FILES:
            return self.send(200, FILES[name], body)
        return self.send(404, b"", body)

    def send(self, status: int, content: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def client(source: str, cache: Path, endpoint: str, **settings: str) -> str:
    """What a fresh process says that fetches `source`."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    environment = kept | {"LMDISTILL_CACHE": str(cache), "HF_ENDPOINT": endpoint, "HOME": str(cache), **settings}
    done = subprocess.run([sys.executable, "-c", CLIENT, source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_repository_is_fetched_once_without_pickles_and_code(hub: str, tmp_path: Path) -> None:
    wanted = ["config.json", "grids/grids.json", "grids/scales.safetensors", "model.safetensors", "tokenizer.json"]
    assert json.loads(client(f"hf:org/name@{COMMIT}", tmp_path, hub)) == [False, wanted]
    assert json.loads(client(f"hf:org/name@{COMMIT}", tmp_path, "http://127.0.0.1:9")) == [True, wanted]
    outside = [path for path in tmp_path.iterdir() if path.name not in ("hub", "locks", "receipts", "digests")]
    assert not outside, "nothing is written outside the cache folder's own parts"


def test_one_file_of_a_repository(hub: str, tmp_path: Path) -> None:
    assert json.loads(client("hf:org/name@main/tokenizer.json", tmp_path, hub)) == [False, ["tokenizer.json"]]


def test_what_is_not_there_is_one_message(hub: str, tmp_path: Path) -> None:
    said = client("hf:org/other@main", tmp_path, hub)
    assert said.startswith("cannot fetch hf:org/other@main") and "HF_TOKEN" in said
    said = client("hf:org/name@main/nothing.bin", tmp_path, hub)
    assert said.startswith("cannot fetch hf:org/name@main/nothing.bin")


def test_offline_is_honoured(hub: str, tmp_path: Path) -> None:
    said = client(f"hf:org/name@{COMMIT}", tmp_path, hub, HF_HUB_OFFLINE="1")
    assert said.startswith(f"cannot fetch hf:org/name@{COMMIT}") and "HF_HUB_OFFLINE" in said
