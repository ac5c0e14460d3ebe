"""Serve a GGUF over HTTP in OpenAI's chat format: python serve.py MODEL.gguf [--port 8080].

    curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

One request at a time; `"stream": true` sends events. A key that this server does not know is refused, not ignored.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from model import PRESETS, ChatModel, Preset, parser

from lmdistill.deployment.runner import load_preset, run
from lmdistill.errors import LmdistillError, nearest

PATH = "/v1/chat/completions"
ROLES = ("system", "user", "assistant")
KEYS = ("messages", "stream", "model", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")


def checked(body: bytes) -> dict[str, Any]:
    """A request's keys; raises LmdistillError for what is not understood."""
    try:
        request = json.loads(body)
    except ValueError as error:
        raise LmdistillError("the request is not JSON", why=str(error)) from error
    if not isinstance(request, dict):
        raise LmdistillError("the request is not a JSON object")
    for key in request:
        if key not in KEYS:
            raise LmdistillError(f"unknown key '{key}'{nearest(key, KEYS)}", why=f"known: {', '.join(KEYS)}")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise LmdistillError(f"`messages` must be a list of {{role, content}}; roles: {', '.join(ROLES)}")
    return request


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )


def handler(model: ChatModel) -> type[BaseHTTPRequestHandler]:
    """A request handler that answers with `model`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer one conversation."""
            if self.path != PATH:
                return self._json(404, {"error": {"message": f"no {self.path}, only {PATH}"}})
            try:
                request = checked(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                request.pop("model", None)  # there is one
                answer = model.complete(**request)
            except (LmdistillError, ValueError, TypeError) as error:
                return self._json(400, {"error": {"message": str(error)}})
            return self._events(answer) if request.get("stream") else self._json(200, answer)

        def do_GET(self) -> None:
            """Whether the server is up and what it serves."""
            self._json(200, {"status": "ok", "model": model.path.name})

        def _json(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _events(self, chunks: Any) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(b"data: " + json.dumps(chunk).encode("utf-8") + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

    return Handler


def main() -> None:
    """Serve until interrupted."""
    arguments = parser(__doc__)
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: from everywhere")
    arguments.add_argument("--port", type=int, default=8080, help="0: any free one")
    given = arguments.parse_args()
    model = ChatModel(given.gguf, load_preset(Preset, PRESETS, given.preset))
    with HTTPServer((given.host, given.port), handler(model)) as server:
        print(f"{given.gguf.name} at http://{given.host}:{server.server_port}{PATH}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run(main)
