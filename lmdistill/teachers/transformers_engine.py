"""The transformers engine: a forward of the body, then the head by chunks of tokens with a top-K on the device.

Axes: B rows, T tokens in a row, N = B·T tokens, D hidden width, V vocabulary, K entries of a token.
B·T·V is never held: at most CHUNK tokens have logits at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import document_positions
from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import ModelRef
from lmdistill.precision import products_in
from lmdistill.teachers.engine import EngineOptions, TopK, TopKWithHidden
from lmdistill.teachers.reduction import reduce_logits
from lmdistill.teachers.registry import engine

CHUNK = 256  # tokens whose logits are held at once; part of the result where a device's kernels depend on it
PROBE_TOKENS = 8


@engine("transformers")
class TransformersEngine:
    """Any causal LM of transformers, on CPU or a GPU."""

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Load the model; raises LmdistillError where its vocabulary is short or it leaks between documents."""
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._options = options
        self._layers: tuple[int, ...] = ()  # hidden states to keep; none while the model is probed
        self._kept: list[Any] = []
        self._model = load_model(teacher.path, options.precision, options.device, load_in=options.load_in)
        finer = options.finer_products and products_in(options.precision, options.device) == "float32"
        if finer and not options.load_in:
            self._model.float()  # weights stay as coarse as was asked for
        head = self._model.get_output_embeddings()
        if head.weight.shape[0] < options.vocab_size:
            raise LmdistillError(
                f"teacher {teacher.name} has logits for {head.weight.shape[0]} ids, its tokenizer {options.vocab_size}",
                why="tokens without a logit cannot be scored",
                fix="use the tokenizer this model was trained with",
            )
        self._weight_VD = head.weight[: options.vocab_size]  # padding of the vocabulary takes no mass
        self._bias_V = None if head.bias is None else head.bias[: options.vocab_size]
        with torch.inference_mode():
            self._plain_head = self._has_plain_head()
            if options.isolate and not self._isolates():
                raise LmdistillError(
                    f"teacher {teacher.name} cannot keep the documents packed into a row apart",
                    why="what stands before a document changes its log-probs (convolutions, recurrence or a cache)",
                    fix="set the corpus stage's `packing` to concat or single",
                )
        self._layers = options.hidden_layers

    def version(self) -> str:
        """transformers and torch, with their versions."""
        import torch
        import transformers

        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        """Top-K of every position of the rows, with one copy from the device at the end."""
        import torch

        rows, length = tokens_BT.shape
        self._kept = []
        with torch.inference_mode():
            tokens = self._to_device(tokens_BT.astype(np.int64))
            positions = self._to_device(document_positions(starts_BT)) if self._options.isolate else None
            next_N = tokens.roll(-1, dims=1).flatten()
            parts = [
                reduce_logits(logits_NV, next_N[start : start + len(logits_NV)], self._options.k)
                for start, logits_NV in self.logits(tokens, positions)
            ]
            columns = [torch.cat(column) for column in zip(*parts, strict=True)]
            kept: list[Any] = [torch.cat(self._kept).float()] if self._layers else []
            ids, logp, tail, lp_next, *hidden = self._to_host([*columns, *kept])
        lp_next_BT = lp_next.reshape(rows, length)
        lp_next_BT[:, -1] = np.nan
        shaped = ids.reshape(rows, length, -1), logp.reshape(rows, length, -1), tail.reshape(rows, length), lp_next_BT
        return TopKWithHidden(*shaped, *hidden) if hidden else TopK(*shaped)

    def logit_chunks(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> Any:
        """Yield (first token, logits [≤ CHUNK, V]) over all N tokens; see `LogitEngine`."""
        positions = self._to_device(document_positions(starts_BT)) if self._options.isolate else None
        yield from self.logits(self._to_device(tokens_BT.astype(np.int64)), positions)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self._model.device

    def logits(self, tokens_BT: Any, positions_BT: Any) -> Any:
        """Yield (first token, logits [≤ CHUNK, V]) over all N tokens."""
        if not self._plain_head:  # the model scales or caps its logits: let it, a row at a time
            for row in range(len(tokens_BT)):
                position = None if positions_BT is None else positions_BT[row : row + 1]
                output = self._forward(self._model, tokens_BT[row : row + 1], position)
                yield row * tokens_BT.shape[1], output.logits[0, :, : self._options.vocab_size]
            return
        hidden_ND = self._hidden(tokens_BT, positions_BT).flatten(0, 1)
        for start in range(0, len(hidden_ND), CHUNK):
            yield start, self._head(hidden_ND[start : start + CHUNK])

    def _hidden(self, tokens_BT: Any, positions_BT: Any) -> Any:
        return self._forward(self._model.base_model, tokens_BT, positions_BT).last_hidden_state

    def _forward(self, model: Any, tokens_BT: Any, positions_BT: Any) -> Any:
        """The model's output; the hidden states that are asked for are put aside, `[B, T, L, D]`."""
        import torch

        wanted: dict[str, Any] = {"output_hidden_states": True} if self._layers else {}
        output = model(tokens_BT, position_ids=positions_BT, use_cache=False, **wanted)
        if self._layers:
            self._kept.append(torch.stack([output.hidden_states[layer] for layer in self._layers], dim=2))
        return output

    def _head(self, hidden_ND: Any) -> Any:
        import torch

        return torch.nn.functional.linear(hidden_ND, self._weight_VD, self._bias_V)

    def _has_plain_head(self) -> bool:
        """Whether the model's logits are its head applied to its last hidden state, with no scale or cap after it."""
        import torch

        tokens = torch.arange(PROBE_TOKENS, device=self.device)[None] % self._options.vocab_size
        expected = self._model(tokens, use_cache=False).logits[0, :, : self._options.vocab_size].float()
        found = self._head(self._hidden(tokens, None)[0]).float()
        tolerance = (1e-2 if self._options.precision == "bfloat16" else 1e-3) * expected.abs().max()
        return bool((found - expected).abs().max() <= tolerance)

    def _isolates(self) -> bool:
        """Whether a document's hidden states are the same, to the last bit, after two different documents."""
        import torch

        ids = torch.arange(3 * PROBE_TOKENS, device=self.device) % self._options.vocab_size
        one, other, document = ids.split(PROBE_TOKENS)
        tokens = torch.stack([torch.cat([one, document]), torch.cat([other, document])])
        positions = torch.arange(PROBE_TOKENS, device=self.device).repeat(2, 2)
        first, second = self._hidden(tokens, positions)[:, PROBE_TOKENS:]
        return bool(torch.equal(first, second))

    def _to_device(self, array: NDArray[np.int64]) -> Any:
        import torch

        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _to_host(self, tensors: list[Any]) -> list[NDArray[Any]]:
        """Copy results to numpy arrays; from a GPU all at once through pinned memory, with one wait."""
        import torch

        if self.device.type != "cuda":
            return [tensor.numpy() for tensor in tensors]
        hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return [host.numpy() for host in hosts]
