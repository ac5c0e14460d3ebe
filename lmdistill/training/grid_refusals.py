"""What the grids that a model folder lies on rule out, said before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.checkpoints import refuse_packed
from lmdistill.errors import PreflightError
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.quantization.placement import Placement

if TYPE_CHECKING:
    from lmdistill.training.config import DistillConfig

LAST_DIGITS = 1e-6  # of a block's largest weight: less than any file's scale can be told apart by


def refuse_converted(folder: Path, wanted: DistillConfig) -> None:
    """Raise PreflightError where the weights in a model folder are not those that training on this grid needs."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    refuse_packed(folder, fix="give the checkpoint in full precision that it was made from")
    placement, keys = Placement.load(folder), wanted.quantize
    if placement is None:
        return
    if wanted.lora is not None:
        raise PreflightError(
            f"the checkpoint {folder} lies on '{placement.preset}', and an adapter merged into it would not",
            fix="train its weights (drop `lora`), or adapt the checkpoint in full precision and quantize after that",
        )
    if keys is None:
        return
    if placement.preset != keys.grid:
        raise PreflightError(
            f"the checkpoint {folder} is converted: it lies on '{placement.preset}', not on '{keys.grid}'",
            why="its full-precision weights are gone, and points of one grid quantised anew are worse than either",
            fix=f"give the checkpoint it was made from, or set `quantize.grid: {placement.preset}`",
        )
    refuse_own_teaching(keys, f"the checkpoint {folder}")
    refuse_other_places(keys, placement, config, f"the checkpoint {folder}")
    if keys.scales == "follow" and (lost := _not_found_again(folder, placement)):
        raise lost_scales(f"the checkpoint {folder}", keys.grid, lost)


def refuse_own_teaching(keys: QuantizeKeys, student: str) -> None:
    """Raise PreflightError where a student on a grid would be taught by itself in full precision."""
    if keys.self_teacher:
        raise PreflightError(
            f"{student} lies on a grid, and `quantize.self_teacher: {keys.self_teacher}` has nothing to teach it",
            why="its full-precision weights are gone: the teacher would be the student itself",
            fix="drop `self_teacher` and learn from the recipe's teacher, or give the checkpoint it was made from",
        )


def lost_scales(student: str, grid: str, tensor: str = "") -> PreflightError:
    """What is wrong with `scales: follow` on a student that lies on scales which the quantiser does not find again."""
    return PreflightError(
        f"{student} lies on '{grid}', and `scales: follow` would put it on another such grid at once",
        why="the scales that this grid's quantiser finds of points are not those that they have"
        + (f" (first: {tensor})" if tensor else ""),
        fix="set `quantize.scales: learned`, or fixed",
    )


def refuse_other_places(keys: QuantizeKeys, lain: Placement, config: Mapping[str, Any], student: str) -> None:
    """Raise PreflightError where a student lies otherwise than the recipe wants it: it stays where it is."""
    from lmdistill.quantization.wanted import wanted

    asked = wanted(keys, config)
    own = {"bits"} if keys.share_bits else set()  # shared out when it was put there
    for name, kind in asked.grids.items():
        both = (one.options.get(name, {}) for one in (asked, lain))
        options, others = ({key: value for key, value in one.items() if key not in own} for one in both)
        if not _same_grid((kind, options), (own_kind := lain.grids.get(name, ""), others)):
            raise PreflightError(
                f"{student} is converted: {name} lies on {own_kind} {others or ''}".rstrip(),
                why=f"`quantize` asks for {kind} {options or ''}".rstrip(),
                fix="give the checkpoint it was made from, or leave those keys as they were when it was trained",
            )


def _same_grid(one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]) -> bool:
    """Whether both name one grid, an option left out being its default."""
    from lmdistill.quantization.plan import FLOATS
    from lmdistill.quantization.registry import get

    if one == other or one[0] != other[0] or one[0] in FLOATS:
        return one == other
    return get(one[0], **one[1]) == get(other[0], **other[1])


def _not_found_again(folder: Path, placement: Placement) -> str:
    """The first tensor that its grid's own quantiser would move off its points; empty where there is none.

    A range in float32, which is not exactly that of its points, may move them in their last digits.
    """
    from lmdistill.deployment.gguf_writer import open_checkpoint

    with open_checkpoint(folder) as checkpoint:
        for tensor, grid in placement.on_grids().items():
            if grid.searches:
                continue
            weights_NB = checkpoint.tensor(tensor).reshape(-1, grid.block)
            moved_NB = (grid.settled().fake_quantise(weights_NB) - weights_NB).abs()
            if bool((moved_NB > LAST_DIGITS * weights_NB.abs().amax(-1, keepdim=True)).any()):
                return tensor
    return ""
