"""The vLLM engine: prompts' log-probs from an offline `vllm.LLM`, on GPUs by default, on CPU with a CPU build.

Axes: see prompts.py. vLLM wants an interpreter of its own: name it in the recipe's `runtime.python`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lmdistill.errors import PreflightError, StageError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.logprobs import Entries, from_flat
from lmdistill.teachers.prompts import PromptEngine
from lmdistill.teachers.registry import engine

STEP_TOKENS = 2048  # tokens of one forward: their logits are held whole, in float32, and vLLM does not count them
CPU_CACHE_BYTES = 2**30  # keys and values on CPU, where vLLM would take most of the memory: prompts wait for room
EXTRA_TOKENS = 2  # beyond a row: the token after it, and the one that vLLM must generate
ENVIRONMENT = {
    # the engine in this process: batches are made up in one order only, so the same rows give the same bytes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",  # a stage works offline
}


@engine("vllm")
class VllmEngine(PromptEngine):
    """A teacher in vLLM, in this process."""

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Load the teacher; raises LmdistillError where this vLLM has no such device or cannot run the teacher."""
        self._options, self._teacher = options, teacher
        _set_environment(options)
        self._llm = _load(teacher, options)

    def version(self) -> str:
        """vllm, torch and transformers, with their versions."""
        import torch
        import transformers
        import vllm

        return f"vllm {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"

    def ask(self, prompts: Sequence[list[int]], k: int) -> Iterator[Entries]:
        """One request a prompt; all are waiting at once, vLLM makes up the batches."""
        from vllm import SamplingParams, TokensPrompt

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=k, flat_logprobs=True, detokenize=False
        )
        requests = [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts]
        with _plainly(self._teacher):
            answers = self._llm.generate(requests, parameters, use_tqdm=False)
        for answer in answers:
            yield from_flat(answer.prompt_logprobs, k)


def _set_environment(options: EngineOptions) -> None:
    """What vLLM reads only from the environment, at import."""
    from lmdistill.assets.cache import cache_dir

    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache_dir() / "vllm"))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of each tensor whose precision it changes
    if options.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))


def _load(teacher: ModelRef, options: EngineOptions) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    wanted, built = options.device.split(":")[0], current_platform.device_type
    if wanted != built:
        raise PreflightError(
            f"this vLLM runs on {built or 'no device it finds'}, the recipe asks for {wanted}",
            fix="set runtime.device, or name an interpreter with a vLLM for that device in runtime.python",
        )
    if ":" in options.device:
        raise PreflightError(
            f"vLLM chooses its GPU itself, not {options.device}",
            fix="set runtime.device to cuda, and CUDA_VISIBLE_DEVICES in the environment",
        )
    where: dict[str, Any] = {"kv_cache_memory_bytes": CPU_CACHE_BYTES}
    if wanted != "cpu":
        where = options.vllm.model_dump()
    with _plainly(teacher):
        return LLM(
            model=str(teacher.path),
            skip_tokenizer_init=True,
            dtype=options.precision,
            max_model_len=options.row_tokens + EXTRA_TOKENS,
            max_logprobs=options.k,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=False,  # a cached prefix has no log-probs
            max_num_batched_tokens=STEP_TOKENS,
            enforce_eager=True,  # compiling and graphs are for decoding
            disable_log_stats=True,
            seed=0,
            **where,
        )


@contextmanager
def _plainly(teacher: ModelRef) -> Iterator[None]:
    """Turn what vLLM raises where a model, a length or a device is not for it into one error."""
    try:
        yield
    except Exception as error:  # its models and kernels raise anything, AttributeError too
        raise StageError(
            f"vLLM cannot run the teacher {teacher.name}",
            why=f"{type(error).__name__}: {error}",
            fix="the stage's log has vLLM's own words; `engine: transformers` runs what vLLM does not",
        ) from error
