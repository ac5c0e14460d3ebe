"""The scripts of export/llama.cpp, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lmdistill.deployment.gguf_writer import write_gguf

SCRIPTS = Path(__file__).parents[2] / "export" / "llama.cpp"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def gguf(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_gguf(toy("lfm2"), path, "f16", name="toy", parent="0" * 64)
    return path


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy, short answers, a short context."""
    path = tmp_path_factory.mktemp("preset") / "short.yaml"
    text = (SCRIPTS / "presets" / "greedy.yaml").read_text()
    text = text.replace("2048", "128").replace("256 ", "6 ").replace("threads: null", "threads: 1")
    path.write_text(text)
    return path


def script(name: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)


def test_chat_answers_the_same_alone_and_in_a_conversation(gguf: Path, preset: Path) -> None:
    """Greedy: the first answer of a conversation is that of --prompt; an overlong question is said, not cut."""
    once = script("chat.py", gguf, "--preset", preset, "--prompt", "Hello")
    assert once.returncode == 0, once.stderr
    assert once.stdout.strip()
    talk = script("chat.py", gguf, "--preset", preset, stdin=f"Hello\n/new\nHello\n{'word ' * 200}\n/quit\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.count(once.stdout.strip()) == 2
    assert "the context 128" in talk.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.gguf"], "no such file: nowhere.gguf"),
        (["nowhere.gguf", "--preset", "laptpo"], "no preset 'laptpo'; did you mean 'laptop'?"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str) -> None:
    done = script("chat.py", *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


def test_a_preset_with_a_typing_error_is_refused(gguf: Path, preset: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(preset.read_text() + "temprature: 1.0\n")
    done = script("chat.py", gguf, "--preset", tmp_path / "p.yaml")
    assert done.returncode == 2
    assert "did you mean 'temperature'?" in done.stderr


def test_a_context_beyond_the_model_s_is_refused(gguf: Path) -> None:
    done = script("chat.py", gguf, "--prompt", "x")
    assert done.returncode == 2
    assert "context 2048 is longer than the 512 tokens" in done.stderr


def test_serve_answers_streams_and_refuses(gguf: Path, preset: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "serve.py"), str(gguf), "--preset", str(preset), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" at ")[1].strip()
            messages = [{"role": "user", "content": "Hello"}]
            whole = json.loads(_post(address, {"messages": messages})[1])["choices"][0]["message"]["content"]
            events = _post(address, {"messages": messages, "stream": True})[1].decode().split("\n\n")
            assert events[-2] == "data: [DONE]"
            deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events[:-2]]
            assert "".join(delta.get("content", "") for delta in deltas) == whole != ""
            for bad, message in (
                ({"messages": messages, "temprature": 0}, "did you mean 'temperature'?"),
                ({"messages": [{"role": "robot", "content": "x"}]}, "`messages` must be a list"),
                ({"messages": [{"role": "user", "content": "word " * 200}]}, "the context 128"),
            ):
                status, answer = _post(address, bad)
                assert (status, message in answer.decode()) == (400, True)
        finally:
            server.kill()


def _post(address: str, body: Any) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(address, data=json.dumps(body).encode(), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_bench_prints_a_line_a_file(gguf: Path) -> None:
    done = script("bench.py", gguf, gguf, "--prefill", 16, "--decode", 4, "--rounds", 1, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("toy.gguf") == 1  # one file, given twice
    assert "prefill" in done.stdout
