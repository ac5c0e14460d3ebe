"""Where the teacher's side of a comparison comes from: hidden states of the cache, or a teacher beside the student.

Axes: R rows, T positions, L layers that are read, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lmdistill.errors import PreflightError
from lmdistill.intermediate.registry import Site
from lmdistill.intermediate.taps import Taps
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.data import SignalsCollator

if TYPE_CHECKING:
    from lmdistill.training.live_teacher import LiveEngine

CACHED = "teacher_hidden"  # the batch's entry with the cache's hidden states [R, T, L, D]


def cached_layers(reader: SignalsReader | CorpusRows) -> tuple[int, ...]:
    """The layers whose hidden states the cache holds; none where it has none."""
    if isinstance(reader, CorpusRows) or reader.manifest.layout.hidden is None:
        return ()
    return reader.manifest.layout.hidden.layers


def check_cached(asked: Sequence[int], held: Sequence[int], loss: str) -> None:
    """Raise PreflightError where the cache lacks a layer, with the key that would bring it."""
    missing = [layer for layer in asked if layer not in held]
    if missing:
        raise PreflightError(
            f"`{loss}` learns from the teacher's layers {_listed(asked)}, and the cache lacks {_listed(missing)}",
            why=f"it holds {_listed(held) or 'no hidden states'}",
            fix=f"set `hidden_layers: [{_listed(sorted({*held, *asked}))}]` in teach, or `live: true` here",
        )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


class HiddenCollator(SignalsCollator):
    """Batches with the cache's hidden states of some layers in them."""

    def __init__(self, reader: SignalsReader, isolate: bool, layers: Sequence[int]) -> None:
        super().__init__(reader, isolate)
        self._signals, held = reader, cached_layers(reader)
        self._places = [held.index(layer) for layer in layers]

    def __call__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows as tensors, with `teacher_hidden` in float32."""
        hidden_RTLD = self._signals.hidden(list(rows))
        return super().__call__(rows) | {CACHED: torch.from_numpy(hidden_RTLD[:, :, self._places])}


class TeacherStates:
    """The teacher's tensors of a batch, by site."""

    def __init__(self, cached: Sequence[int], engine: LiveEngine | None, live: Sequence[Site]) -> None:
        self.layers = tuple(cached)
        self._engine = engine
        self.taps = None if engine is None or not live else Taps(engine.model, live)

    def of(self, inputs: dict[str, Any]) -> dict[Site, torch.Tensor]:
        """Those of this batch, `[R, T, …]`; the teacher runs if it has not yet done so on this batch."""
        found = {Site("hidden", layer): inputs[CACHED][:, :, place] for place, layer in enumerate(self.layers)}
        if self.taps is None or self._engine is None:
            return found
        if not self.taps.seen:
            with self.taps.recording():
                self._engine.run(inputs["input_ids"], inputs.get("position_ids"))
        return {**self.taps.seen, **found}
