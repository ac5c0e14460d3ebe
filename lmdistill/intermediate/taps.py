"""What a model computes at chosen sites, kept during one forward pass: references to tensors, no copies.

Axes: R rows, T positions, D hidden width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lmdistill.errors import PreflightError
from lmdistill.intermediate.registry import Site
from lmdistill.students import blocks

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block was called with beside its hidden state


def decoder_blocks(model: Any) -> Any:
    """The model's decoder blocks, in order; PreflightError where it has no such list."""
    body = model.get_decoder()
    if not hasattr(body, "layers"):
        raise PreflightError(
            f"intermediate losses need a model of decoder blocks, and {type(body).__name__} has no list of them",
            fix="drop `intermediate`",
        )
    return body.layers


def attention_blocks(model: Any) -> tuple[int, ...]:
    """The blocks that attend, counted from 1."""
    return tuple(place for place, block in enumerate(decoder_blocks(model), 1) if hasattr(block, "self_attn"))


def projection_of(block: Any, letter: str) -> Any:
    """The module that gives a block's queries (q), keys (k) or values (v), as they enter the rotation.

    Raises PreflightError where the block makes them in another way.
    """
    attention = getattr(block, "self_attn", None)
    for name in (f"{letter}_layernorm", f"{letter}_norm", f"{letter}_proj"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise PreflightError(
        f"a block of type {type(block).__name__} has no {letter}_proj",
        why="its attention is missing, or makes queries, keys and values at once",
        fix="choose other layers, or a loss on hidden states",
    )


class Taps:
    """Hooks on a model that keep what it computes at `sites` while `recording()` is open."""

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        self.seen: dict[Site, torch.Tensor] = {}
        self.calls: dict[Site, Call] = {}
        self._recording = False
        self._model, self._layers = model, decoder_blocks(model)
        self._handles = [self._hook(site) for site in dict.fromkeys(sites)]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is computed inside; `clear()` lets go of it."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def clear(self) -> None:
        """Let go of what was kept."""
        self.seen.clear()
        self.calls.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def rerun(self, site: Site, input_RTD: torch.Tensor) -> torch.Tensor:
        """The block's output for another input, with the masks and positions it was called with."""
        _, kwargs = self.calls[site]
        out = self._layers[site.layer - 1](input_RTD, **kwargs)
        out_RTD = out if isinstance(out, torch.Tensor) else out[0]
        return blocks.final_norm(self._model)(out_RTD) if site.layer == len(self._layers) else out_RTD

    def _hook(self, site: Site) -> Any:
        if site.kind == "block" or (site.kind == "hidden" and site.layer == 0):
            return self._layers[max(0, site.layer - 1)].register_forward_pre_hook(
                self._keep_input(site), with_kwargs=True
            )
        if site.kind != "hidden":
            return projection_of(self._layers[site.layer - 1], site.kind).register_forward_hook(self._keep_output(site))
        last = site.layer == len(self._layers)
        module = blocks.final_norm(self._model) if last else self._layers[site.layer - 1]
        return module.register_forward_hook(self._keep_output(site))

    def _keep_output(self, site: Site) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            if self._recording:
                self.seen[site] = out if isinstance(out, torch.Tensor) else out[0]

        return hook

    def _keep_input(self, site: Site) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._recording:
                self.seen[site], self.calls[site] = args[0], (args[1:], dict(kwargs))

        return hook
