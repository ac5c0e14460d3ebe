"""Quantized distillation in the trainer: the student is put on its grids before training and settles on them after.

A student that already lies on grids stays on them, whether the recipe says `quantize` or not: what is exported is
what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import Placement

if TYPE_CHECKING:
    import torch

    from lmdistill.losses.registry import LiveTeacher
    from lmdistill.training.run import Place, Reader

CALIBRATION_ROWS = 4  # at once
START = "start"  # below the work folder


def put_student(student: Any, place: Place, keys: QuantizeKeys | None, reader: Reader) -> None:
    """Put the student on the grids that the recipe wants, or keep it on those it lies on.

    What the start took to find is kept among the checkpoints: a run that goes on does not measure again.
    """
    from lmdistill.quantization.on_grid import kept_on_its_grids
    from lmdistill.quantization.start import put_on_grids
    from lmdistill.quantization.wanted import wanted

    if keys is None:
        kept_on_its_grids(student, place.student)
        return
    placement = wanted(keys, json.loads((place.student / "config.json").read_text("utf-8")))
    lain = Placement.load(place.student)
    if lain is not None:
        placement = replace(placement, grids=lain.grids, options=lain.options, scales=lain.scales)
    rows = _rows(reader, keys.start_tokens, student.device)
    handle = place.ranks.first_then_all(lambda: put_on_grids(student, keys, placement, rows, place.work / START))
    for scale in handle.learned_scales():
        rms = scale.detach().float().pow(2).mean().sqrt().item()
        scale.own_lr, scale.no_decay = keys.scale_lr * (rms or 1.0), True


def _rows(reader: Reader, tokens: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The first rows of the training text, so many tokens, some at a time; padding is not measured, nor counted."""
    import numpy as np
    import torch

    from lmdistill.corpus.format import PAD

    start = 0
    while tokens > 0 and start < reader.rows:
        end = min(start + CALIBRATION_ROWS, start + -(-tokens // reader.row_tokens), reader.rows)
        batch = reader.read(list(range(start, end)))
        tokens_RT = torch.from_numpy(batch.tokens_RT.astype(np.int64)).to(device)
        real_RT = torch.from_numpy(batch.flags_RT & PAD == 0).to(device)
        start, tokens = end, tokens - int(real_RT.sum())
        if real_RT.all():
            yield tokens_RT
        else:
            yield from (tokens_T[real_T][None] for tokens_T, real_T in zip(tokens_RT, real_RT, strict=True))


def settle(student: Any) -> Placement | None:
    """Have a student on grids lie there for good; None where it is on none."""
    from lmdistill.quantization.on_grid import handle_of

    handle = handle_of(student)
    return None if handle is None else handle.settle()


def grid_record(student: Any, placement: Placement | None) -> dict[str, Any]:
    """What training.json says of the grid: the file type, and bits a weight as stored and with Huffman's codes."""
    from lmdistill.quantization.size import sizes

    if placement is None:
        return {}
    parameters = {name: weight.detach() for name, weight in student.named_parameters()}
    return {"grid": {"preset": placement.preset, **sizes(parameters, placement)}}


class MovingTeacher:
    """The student without its grids as its live teacher: the full-precision weights as they are, no second copy."""

    def __init__(self, student: Any, vocab_size: int) -> None:
        self._student, self._vocab_size = student, vocab_size

    def speak(self, tokens_RT: Any, positions_RT: Any, counted_N: Any) -> LiveTeacher:
        """What the full-precision weights have to say at the flat positions that count."""
        from lmdistill.quantization.on_grid import handle_of
        from lmdistill.training.live_teacher import spoken_by

        handle = handle_of(self._student)
        assert handle is not None  # the recipe's `self_teacher` goes with `quantize`
        with handle.off():
            return spoken_by(self._student, self._vocab_size, tokens_RT, positions_RT, counted_N)
