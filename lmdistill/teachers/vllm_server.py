"""The vllm_server engine: a teacher that `vllm serve` runs, perhaps on another machine, asked by token ids.

Axes: see prompts.py. The server says which model it runs, not which weights: only the proof of engine_parity.py, made
whenever the engine is opened, shows that it speaks for this teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.logprobs import Entries, from_json
from lmdistill.teachers.prompts import PromptEngine
from lmdistill.teachers.registry import engine
from lmdistill.teachers.vllm_endpoint import Endpoint
from lmdistill.teachers.vllm_options import EndpointOptions

EXTRA_TOKENS = 2  # beyond a row: the token after it, and the one that vLLM must generate


@engine("vllm_server")
class VllmServerEngine(PromptEngine):
    """A teacher behind an endpoint."""

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Find the server's model; raises LmdistillError where the server is away or cannot say K log-probs a token."""
        self._options = options
        self._endpoint = Endpoint(need_endpoint(options.endpoint))
        self._model = self._endpoint.model()
        longest = [0] * (options.row_tokens + EXTRA_TOKENS - 1)
        self._ask_one(longest, options.k)

    def version(self) -> str:
        """What is asked; `served_version` knows the server's own version."""
        return "vllm serve"

    def ask(self, prompts: Sequence[list[int]], k: int) -> Iterator[Entries]:
        """One HTTP request a prompt, `concurrency` at a time, in order; the first failure stops those not begun."""
        options = self._endpoint.options
        with ThreadPoolExecutor(options.concurrency, thread_name_prefix="vllm-endpoint") as pool:
            waiting = [pool.submit(self._ask_one, tokens, k) for tokens in prompts]
            try:
                for answer in waiting:
                    yield answer.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask_one(self, tokens: list[int], k: int) -> Entries:
        return from_json(self._endpoint.prompt_logprobs(self._model, tokens, k), k)


def need_endpoint(options: EndpointOptions | None) -> EndpointOptions:
    """The endpoint of the recipe; raises PreflightError where it has none."""
    if options is None:
        raise PreflightError(
            "engine 'vllm_server' needs a server to ask", fix="add `endpoint: {url: http://localhost:8000}`"
        )
    return options


def served_version(options: EndpointOptions | None) -> str:
    """The server and its version, for the manifest; raises LmdistillError where it is away."""
    return f"vllm serve {Endpoint(need_endpoint(options)).version()}"


def check_server(options: EndpointOptions | None) -> None:
    """Raise LmdistillError where the server is away, or does not serve the model: asked once, before work starts."""
    Endpoint(need_endpoint(options).model_copy(update={"retries": 0})).model()
