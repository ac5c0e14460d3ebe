"""The ExecuTorch runtime: a `.pte`, through lmdistill.deployment."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lmdistill.errors import StageError
from lmdistill.evaluation.file_runtime import FileRuntime
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime


@runtime("executorch")
class PteRuntime(FileRuntime):
    """A `.pte` open in ExecuTorch on the CPU."""

    @staticmethod
    def missing() -> str | None:
        """The package to install, where it is not there."""
        return None if importlib.util.find_spec("executorch") else "pip install 'lmdistill[executorch]'"

    @staticmethod
    def open(path: Path, options: RuntimeOptions, *, exact: bool) -> PteRuntime:
        """Open the file; a program computes in one way, so `exact` changes nothing."""
        from lmdistill.deployment.executorch.runtime import ExecutorchRuntime

        program = ExecutorchRuntime(path, n_threads=options.threads)
        if program.context < options.context:
            raise StageError(
                f"{path.name} holds {program.context} positions, the longest sequence has {options.context}",
                fix="export it with a larger `context`",
            )
        return PteRuntime(program)
