"""A model put on the 8da4w grid with scales that fit its inputs: what an importance matrix is to a GGUF file.

ExecuTorch has no such quantiser of its own. The scales are the best of some factors of the reference's, by squared
error with each input's mean square as weight, as `start: weighted` finds them, and the program packs the very points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmdistill.deployment.executorch.places import EVERYTHING, GRID
from lmdistill.quantization.placement import Placement


def save_weighed(
    source: Path, folder: Path, format_name: str, sequences: Sequence[Sequence[int]], threads: int | None = None
) -> Placement:
    """Write the model in `source` as points of a format, its inputs measured on token ids; where they lie.

    Embeddings and head have no inputs that are measured, and get the reference's scales.
    """
    import torch

    from lmdistill.checkpoints import load_model, save_model
    from lmdistill.deployment.gguf_writer import read_config
    from lmdistill.quantization.keys import QuantizeKeys
    from lmdistill.quantization.start import put_on_grids
    from lmdistill.quantization.wanted import wanted

    if threads:
        torch.set_num_threads(threads)
    ends = GRID if format_name.endswith(EVERYTHING) else None
    keys = QuantizeKeys(grid=GRID, embeddings=ends, start="weighted", scales="fixed")
    model = load_model(source)
    rows = (torch.tensor([list(tokens_T)]) for tokens_T in sequences)
    placement = put_on_grids(model, keys, wanted(keys, read_config(source)), rows).settle()
    save_model(model, folder, tokenizer_from=source)
    placement.save(folder)
    return placement
