"""The transformers runtime: a checkpoint folder in float32.

Axes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import StageError
from lmdistill.evaluation.divergence import log_softmax_in_place
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime("transformers")
class CheckpointRuntime:
    """A model folder in Hugging Face layout, open in transformers."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device = model, device

    @staticmethod
    def missing() -> str | None:
        """The package to install, where it is not there."""
        return None if importlib.util.find_spec("transformers") else "pip install 'lmdistill[train]'"

    @staticmethod
    def open(path: Path, options: RuntimeOptions, *, exact: bool) -> CheckpointRuntime:
        """Load the checkpoint in float32; there is no faster setting, so `exact` changes nothing.

        One that was trained on a grid computes as it did in training, rounded activations included.
        """
        import torch

        from lmdistill.checkpoints import load_model
        from lmdistill.quantization.on_grid import kept_on_its_grids

        if options.threads:
            torch.set_num_threads(options.threads)
        model = load_model(path, "float32", options.device)
        kept_on_its_grids(model, path)
        return CheckpointRuntime(model, options.device)

    def log_probs(self, tokens_T: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
        """Log-probabilities [T, V]; raises StageError where the model's vocabulary is smaller."""
        import torch

        ids_1T = torch.from_numpy(tokens_T)[None].to(self._device)
        with torch.inference_mode():
            logits_TV = self._model(input_ids=ids_1T, use_cache=False).logits[0]
            width = logits_TV.shape[-1]
            if width < vocab_size:
                raise StageError(f"the model knows {width:,} ids, the corpus uses {vocab_size:,}")
            logits_TV = logits_TV[:, :vocab_size].float().cpu().contiguous()
            array_TV: NDArray[np.float32] = log_softmax_in_place(logits_TV).numpy()
        return array_TV

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds of one forward over `tokens` tokens, logits of the last only."""
        import torch

        ids_1T = self._pseudo_tokens(tokens)
        begin = time.perf_counter()
        with torch.inference_mode():
            float(self._model(input_ids=ids_1T, logits_to_keep=1).logits[0, -1, 0])  # .float waits for the device
        return time.perf_counter() - begin

    def decode_seconds(self, tokens: int) -> float:
        """Seconds of `tokens` forwards of one token each, with the cache."""
        import torch

        ids_1T, cache = self._pseudo_tokens(tokens), None
        begin = time.perf_counter()
        with torch.inference_mode():
            for place in range(tokens):
                output = self._model(input_ids=ids_1T[:, place : place + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                float(output.logits[0, -1, 0])
        return time.perf_counter() - begin

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None

    def _pseudo_tokens(self, tokens: int) -> Any:
        """The same scattered ids on every call: what the ids are does not change the work."""
        import torch

        return (torch.arange(tokens, device=self._device)[None] * 7919 + 101) % self._model.config.vocab_size
