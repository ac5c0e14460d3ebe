"""Quantized distillation in the trainer: the student is put on its grids before training and settles on them after.

A student that already lies on grids stays on them, whether the recipe says `quantize` or not: what is exported is
what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import PreflightError
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import Placement

if TYPE_CHECKING:
    import torch

    from lmdistill.losses.registry import LiveTeacher
    from lmdistill.training.config import DistillConfig
    from lmdistill.training.run import Place, Reader

CALIBRATION_ROWS = 4  # at once
START = "start"  # below the work folder


def refuse_converted(folder: Path, wanted: DistillConfig) -> None:
    """Raise PreflightError where the weights in a model folder are not those that training on this grid needs."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise PreflightError(
            f"the checkpoint {folder} is converted: its weights are packed integers",
            why=f"its config.json has quantization_config ({config['quantization_config'].get('quant_method', '?')})",
            fix="give the checkpoint in full precision that it was made from",
        )
    placement, keys = Placement.load(folder), wanted.quantize
    if placement is not None and wanted.lora is not None:
        raise PreflightError(
            f"the checkpoint {folder} lies on '{placement.preset}', and an adapter merged into it would not",
            fix="train its weights (drop `lora`), or adapt the checkpoint in full precision and quantize after that",
        )
    if keys is not None and placement is not None and placement.preset != keys.grid:
        raise PreflightError(
            f"the checkpoint {folder} is converted: it lies on '{placement.preset}', not on '{keys.grid}'",
            why="its full-precision weights are gone, and points of one grid quantised anew are worse than either",
            fix=f"give the checkpoint it was made from, or set `quantize.grid: {placement.preset}`",
        )
    if keys is not None and placement is not None:
        refuse_lost_scales(keys, f"the checkpoint {folder}")
        _refuse_other_places(keys, placement, config, folder)


def refuse_lost_scales(keys: QuantizeKeys, student: str) -> None:
    """Raise PreflightError where training on would begin with other scales than the student lies on."""
    from lmdistill.quantization.plan import PRESETS
    from lmdistill.quantization.registry import get

    if keys.scales == "follow" and keys.grid not in PRESETS and not get(keys.grid).finds_again:
        raise PreflightError(
            f"{student} lies on '{keys.grid}', and `scales: follow` would put it on another such grid at once",
            why="the scales that this grid's quantiser finds of points are not those that they have",
            fix="set `quantize.scales: learned`, or fixed",
        )


def _refuse_other_places(keys: QuantizeKeys, placement: Placement, config: dict[str, Any], folder: Path) -> None:
    """Raise PreflightError where a student lies otherwise than the recipe wants it: it stays where it is."""
    from lmdistill.quantization.wanted import wanted

    asked = wanted(keys, config)
    own = {"bits"} if keys.share_bits else set()  # shared out when it was put there
    for name, kind in asked.grids.items():
        options, lain = (
            {k: v for k, v in one.options.get(name, {}).items() if k not in own} for one in (asked, placement)
        )
        if (kind, options) != (own_kind := placement.grids.get(name), lain):
            raise PreflightError(
                f"the checkpoint {folder} is converted: {name} lies on {own_kind} {lain or ''}".rstrip(),
                why=f"`quantize` asks for {kind} {options or ''}".rstrip(),
                fix="give the checkpoint it was made from, or leave those keys as they were when it was trained",
            )


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
    """The first rows of the training text, so many tokens, some at a time."""
    import numpy as np
    import torch

    count = min(reader.rows, -(-tokens // reader.row_tokens))
    for start in range(0, count, CALIBRATION_ROWS):
        batch = reader.read(list(range(start, min(start + CALIBRATION_ROWS, count))))
        yield torch.from_numpy(batch.tokens_RT.astype(np.int64)).to(device)


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
