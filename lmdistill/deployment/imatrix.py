"""llama.cpp's importance matrix of a checkpoint: the mean square of each input of each linear layer, on some text.

llama.cpp's own tool runs the model there; this runs the checkpoint itself, in float32, and hands the numbers over in
memory. The embeddings have none, as in llama.cpp: their rows are looked up.

Axes: D inputs of a layer, R rows, T tokens in a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.gguf_writer import read_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Importance = dict[str, NDArray[np.float32]]  # [D] by the tensor's name in the file


def importance_of(folder: Path, sequences: Sequence[Sequence[int]], threads: int | None = None) -> Importance:
    """The matrix of the checkpoint in `folder` on `sequences` of token ids."""
    import numpy as np
    import torch

    from lmdistill.checkpoints import load_model
    from lmdistill.quantization.importance import measure

    if threads:
        torch.set_num_threads(threads)
    rows = (torch.tensor([list(tokens_T)]) for tokens_T in sequences)
    moments = measure(load_model(folder), rows)
    names = architecture_of(read_config(folder)).gguf_names()
    return {names[weight]: np.ascontiguousarray(moments.square(weight).numpy()) for weight in sorted(moments.sums)}


def as_c_array(importance: Importance, lib: Any) -> Any:
    """What `llama_model_quantize_params.imatrix` points to: an array that ends with an entry without a name.

    The numbers stay those of `importance`, which must outlive it.
    """
    entries = (lib.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, square_D) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), square_D.size
        entry.data = square_D.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries
