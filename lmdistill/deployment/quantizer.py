"""Quantises a GGUF file with llama.cpp's own code."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.deployment.formats import Format
from lmdistill.deployment.llama_cpp_runtime import default_threads, llama_library, take_log
from lmdistill.errors import LmdistillError

if TYPE_CHECKING:
    from lmdistill.deployment.imatrix import Importance


def quantize(
    source: Path, target: Path, format_: Format, *, threads: int | None = None, importance: Importance | None = None
) -> list[str]:
    """Write `source` (an F32 file) to `target` in `format_`; the number of threads does not change the bytes.

    With `importance` errors are weighed by each input's mean square. Returns llama.cpp's warnings, one for each tensor
    whose shape did not fit. Raises LmdistillError where it fails.
    """
    lib = llama_library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, format_.ftype)
    params.nthread = threads or default_threads()
    if importance:
        from lmdistill.deployment.imatrix import as_c_array

        entries = as_c_array(importance, lib)
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    take_log()
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    log = take_log()
    if status != 0:
        raise LmdistillError(f"llama.cpp could not make {target.name}", why="; ".join(log) or f"status {status}")
    return log
