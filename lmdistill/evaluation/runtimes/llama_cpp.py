"""The llama.cpp runtime: a GGUF file, through lmdistill.deployment."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lmdistill.evaluation.file_runtime import FileRuntime
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime

BATCH = 512  # tokens evaluated at once, llama.cpp's own default for its micro-batch


@runtime("llama.cpp")
class GgufRuntime(FileRuntime):
    """A GGUF file open in llama.cpp on the CPU."""

    @staticmethod
    def missing() -> str | None:
        """The package to install, where it is not there."""
        return None if importlib.util.find_spec("llama_cpp") else "pip install 'lmdistill[gguf]'"

    @staticmethod
    def open(path: Path, options: RuntimeOptions, *, exact: bool) -> GgufRuntime:
        """Open the file; `exact` keeps keys and values in 32 bits and leaves flash attention off."""
        from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime

        return GgufRuntime(
            LlamaCppRuntime(path, n_ctx=options.context, n_batch=BATCH, n_threads=options.threads, exact=exact)
        )
