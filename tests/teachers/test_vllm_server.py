"""The vllm_server engine against a small server that gives answers recorded from a real `vllm serve` (0.32)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdistill.errors import LmdistillError, PreflightError, StageError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers import vllm_endpoint
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.registry import create_engine
from lmdistill.teachers.vllm_options import EndpointOptions

RECORDED = json.loads((Path(__file__).parent / "vllm_recorded.json").read_text())
TEACHER = ModelRef("smollm2", Path("unused"), "d" * 64)
VOCAB, K = 49152, 4
PROMPT = RECORDED["prompt"]  # of the recorded completion: a row of six tokens, and its last one again
ROW = np.asarray([PROMPT[:-1]], np.int32)
NO_STARTS = np.zeros(ROW.shape, bool)
Answer = tuple[int, Any]


class Server:
    """Counts requests, and lets a test change what is answered."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once, self.most_at_once, self.wait = 0, 0, 0.0
        self.answers: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "/v1/models": lambda _: tuple(RECORDED["models"]),
            "/version": lambda _: tuple(RECORDED["version"]),
            "/v1/completions": self.complete,
        }
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> Answer:
        """The recorded answer, cut or repeated to the prompt's length: each position keeps its own K entries."""
        status, answer = json.loads(json.dumps(RECORDED["completion"]))
        listing, length = answer["choices"][0]["prompt_logprobs"], len(body["prompt"])
        answer["choices"][0]["prompt_logprobs"] = (listing + listing[1:] * (length // 6))[:length]
        return status, answer

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        with self.lock:
            self.asked.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.wait)
        try:
            return self.answers[path](body)
        finally:
            with self.lock:
                self.at_once -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a free port of this machine."""
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            made.headers.append(dict(self.headers))
            status, answer = made.answer(self.path, json.loads(self.rfile.read(size) or b"{}"))
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{httpd.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield made
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(vllm_endpoint, "FIRST_WAIT", 0.001)


def opened(server, **endpoint):
    engine = create_engine("vllm_server")
    options = EndpointOptions(url=server.url, **{"retries": 2, **endpoint})
    engine.open(TEACHER, EngineOptions(K, VOCAB, row_tokens=ROW.shape[1], endpoint=options))
    server.asked.clear()
    return engine


def test_a_recorded_answer_becomes_the_top_k(server):
    """What the real server said of each position, against a plain loop over the recording."""
    found = opened(server).score(ROW, NO_STARTS)
    listing = RECORDED["completion"][1]["choices"][0]["prompt_logprobs"]
    for at, position in enumerate(listing[1:]):
        best = sorted(((-e["logprob"], int(i)) for i, e in position.items()))[:K]
        assert found.ids_BTK[0, at].tolist() == [i for _, i in best]
        np.testing.assert_allclose(found.logp_BTK[0, at], [-lp for lp, _ in best], rtol=1e-6)
        mass = sum(np.exp(-lp) for lp, _ in best)
        np.testing.assert_allclose(np.exp(found.tail_BT[0, at]), 1 - mass, atol=1e-6)
        if at < len(listing) - 2:
            assert found.lp_next_BT[0, at] == pytest.approx(position[str(PROMPT[at + 1])]["logprob"])
    assert np.isnan(found.lp_next_BT[0, -1])


def test_the_server_is_asked_by_token_ids_for_no_more_than_it_must(server):
    """One request a row: its ids and one more, K log-probs of the prompt, one generated token."""
    opened(server).score(ROW, NO_STARTS)
    [body] = server.asked
    assert body["prompt"] == PROMPT
    assert (body["prompt_logprobs"], body["max_tokens"], body["model"]) == (K, 1, "smollm2")


def test_requests_under_way_are_bounded_and_answers_keep_their_order(server):
    """Never more than `concurrency` at once; with that, as many as allowed."""
    server.wait = 0.05
    rows = np.repeat(ROW, 7, axis=0)
    engine = opened(server, concurrency=3)
    server.most_at_once = 0
    found = engine.score(rows, np.zeros(rows.shape, bool))
    assert server.most_at_once == 3
    assert len(server.asked) == 7
    np.testing.assert_array_equal(found.logp_BTK, np.repeat(found.logp_BTK[:1], 7, axis=0))


def test_a_key_is_sent_from_the_environment(server, monkeypatch):
    """VLLM_API_KEY goes as a bearer token, and nowhere when it is not set."""
    opened(server)
    assert all("Authorization" not in headers for headers in server.headers)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    opened(server)
    assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_an_overloaded_server_is_asked_again(server):
    """Two 503s cost two more tries and change nothing."""
    engine = opened(server)
    expected = engine.score(ROW, NO_STARTS)
    busy = [(503, {"error": {"message": "overloaded"}})] * 2
    server.answers["/v1/completions"] = lambda body: busy.pop() if busy else server.complete(body)
    np.testing.assert_array_equal(engine.score(ROW, NO_STARTS).logp_BTK, expected.logp_BTK)
    assert not busy


@pytest.mark.parametrize(("name", "said", "fix"), [
    ("too_few_logprobs", "greater than max allowed", "--max-logprobs"),
    ("wrong_model", "does not exist", "correct `endpoint`"),
    ("too_long", "maximum context length", "room for a row"),
])  # fmt: skip
def test_a_refusal_of_the_real_server_is_told_once_with_what_to_do(server, name, said, fix):
    """A 4xx is not asked again; the message has the server's words."""
    status, answer = RECORDED[name]
    server.answers["/v1/completions"] = lambda body: (status, answer)
    with pytest.raises(StageError, match=f"HTTP {status}") as caught:
        opened(server)
    assert said in caught.value.why
    assert fix in caught.value.fix
    assert len(server.asked) == 2  # the models, and one completion


@pytest.mark.parametrize(("answer", "message"), [
    ((500, {"error": {"message": "engine dead"}}), "HTTP 500"),
    ((401, {"error": "Unauthorized"}), "HTTP 401"),
    ((200, b"<html>"), "gives no JSON object"),
    ((200, {"choices": [{"text": "an answer of another server"}]}), "without prompt_logprobs"),
    ((200, {"choices": [{"prompt_logprobs": [None, {"7": {}}]}]}), "not laid out as expected"),
])  # fmt: skip
def test_what_is_no_vllm_is_a_plain_error(server, answer, message):
    """A dead engine, a missing key, another server: what, why and what to do."""
    server.answers["/v1/completions"] = lambda body: answer
    with pytest.raises(LmdistillError, match=message) as caught:
        opened(server)
    assert caught.value.why and caught.value.fix


def test_a_server_that_goes_away_is_said_so(server):
    """Connections that fail are tried again, then named with the address."""
    url, gone = server.url, EndpointOptions(url="http://127.0.0.1:9", retries=1)
    engine = create_engine("vllm_server")
    with pytest.raises(StageError, match=r"no answer from the teacher's server http://127.0.0.1:9 after 2 tries"):
        engine.open(TEACHER, EngineOptions(K, VOCAB, endpoint=gone))
    assert url != gone.url


def test_the_model_is_named_where_several_are_served(server):
    """One model needs no name; of several the recipe says which; another name is refused with those that are there."""
    one = RECORDED["models"][1]["data"][0]
    with pytest.raises(StageError, match="serves smollm2, not 'other'"):
        opened(server, model="other")
    server.answers["/v1/models"] = lambda _: (200, {"data": [one, one | {"id": "lora"}]})
    with pytest.raises(StageError, match="serves smollm2, lora: which is the teacher"):
        opened(server)
    opened(server, model="smollm2")


def test_an_engine_without_endpoint():
    """The recipe must say whom to ask."""
    with pytest.raises(PreflightError, match="needs a server to ask"):
        create_engine("vllm_server").open(TEACHER, EngineOptions(K, VOCAB))
