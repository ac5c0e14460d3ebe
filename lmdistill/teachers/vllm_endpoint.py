"""A client of `vllm serve`: JSON over HTTP, tried again where the server is away or overloaded, else a plain error."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from lmdistill.errors import StageError
from lmdistill.teachers.vllm_options import EndpointOptions

FIRST_WAIT = 0.5  # seconds before the second try
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses of a server that is starting, overloaded or behind a proxy
TOO_FEW_LOGPROBS = "greater than max allowed"  # what vLLM says where its --max-logprobs is below K
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy for the web is not for this server


class Endpoint:
    """One server. Safe to use from many threads."""

    def __init__(self, options: EndpointOptions) -> None:
        self.options = options
        self.url = options.url.rstrip("/").removesuffix("/v1")

    def version(self) -> str:
        """The server's version of vLLM."""
        return str(self._json("/version").get("version", "unknown"))

    def model(self) -> str:
        """The name of the model to ask; raises StageError where it is not served, or several are and none is named."""
        served = [str(entry.get("id")) for entry in self._json("/v1/models").get("data", [])]
        wanted = self.options.model
        if wanted in served:
            return str(wanted)
        if wanted is None and len(served) == 1:
            return served[0]
        raise StageError(
            f"{self.url} serves {', '.join(served) or 'no model'}"
            + (f", not '{wanted}'" if wanted is not None else ": which is the teacher?"),
            fix="name the teacher's in `endpoint.model`, or start `vllm serve` with it",
        )

    def prompt_logprobs(self, model: str, tokens: list[int], k: int) -> list[Any]:
        """`prompt_logprobs` of one prompt of token ids, as the server lays them out."""
        body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        answer = self._json("/v1/completions", body)
        try:
            [choice] = answer["choices"]
            found: list[Any] = choice["prompt_logprobs"]
        except (KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"{self.url} answers without prompt_logprobs",
                why=f"it is no `vllm serve`, or one of another version: {error!r}",
                fix="docs/signals.md names versions that are known to work",
            ) from error
        return found

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        for attempt in range(self.options.retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                failure = self._refused(path, error)
                if error.code not in AGAIN:
                    raise failure from error
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                failure = self._away(error)
        raise failure

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with OPENER.open(request, timeout=self.options.timeout) as response:
            raw = response.read()
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise _no_vllm(self.url + path, raw) from error
        if not isinstance(answer, dict):
            raise _no_vllm(self.url + path, raw)
        return answer

    def _away(self, error: Exception) -> StageError:
        return StageError(
            f"no answer from the teacher's server {self.url} after {self.options.retries + 1} tries",
            why=f"{getattr(error, 'reason', None) or error!r}",
            fix="start it again and run the same command: finished shards are kept",
        )

    def _refused(self, path: str, error: urllib.error.HTTPError) -> StageError:
        said = _message(error)
        if TOO_FEW_LOGPROBS in said:
            fix = "start `vllm serve` with --max-logprobs of at least `k`, or set a smaller `k`"
        elif error.code in (401, 403):
            fix = "set VLLM_API_KEY to the server's key"
        elif error.code in AGAIN:
            fix = "look into the server's log; then run the same command: finished shards are kept"
        else:
            fix = "correct `endpoint`, or start `vllm serve` with the teacher and room for a row and two tokens"
        return StageError(f"{self.url}{path} refuses: HTTP {error.code}", why=said, fix=fix)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server said, in vLLM's error layout or in its own words."""
    try:
        raw = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as broken:
        return f"{error.reason} ({broken!r})"
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return raw[:300] or str(error.reason)


def _no_vllm(url: str, raw: bytes) -> StageError:
    return StageError(
        f"{url} gives no JSON object", why=f"it begins with {raw[:80]!r}", fix="set `endpoint.url` to a `vllm serve`"
    )
