"""Where a trained model's tensors lie: the grid of each and its scales, kept in a folder beside the weights.

`grids/grids.json` names the grid of every tensor, `grids/scales.safetensors` has `<tensor>|<scale>`. Most grids find
their scales again in their own points; learned scales and searched ones are not found again, so all are kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.files import fsync, write_text

if TYPE_CHECKING:
    import torch

    from lmdistill.quantization.grid import Grid

FOLDER = "grids"
_BETWEEN = "|"


@dataclass(frozen=True)
class Placement:
    """The types of a checkpoint's tensors, by their names there, and the scales of those on a grid."""

    grids: dict[str, str]  # a grid of `quantization/grids`, f32 or f16
    scales: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a tensor's grid, where it has some
    preset: str = ""  # the file type that this is, by llama.cpp's name, or the grid's name

    def grid(self, tensor: str) -> Grid:
        """The grid of a tensor that is on one, with its options."""
        from lmdistill.quantization.registry import get

        return get(self.grids[tensor], **self.options.get(tensor, {}))

    def on_grids(self) -> dict[str, Grid]:
        """The grids of all tensors that are on one."""
        from lmdistill.quantization.plan import FLOATS

        return {tensor: self.grid(tensor) for tensor, kind in self.grids.items() if kind not in FLOATS}

    def with_scales(self, scales: dict[str, dict[str, torch.Tensor]]) -> Placement:
        """The same places with these scales."""
        return replace(self, scales=scales)

    def save(self, model: Path) -> None:
        """Write it into the model folder `model`, whole or not at all."""
        from safetensors.torch import save_file

        folder = model / FOLDER
        folder.mkdir(exist_ok=True)
        flat = {
            f"{tensor}{_BETWEEN}{name}": scale.contiguous()
            for tensor, scales in sorted(self.scales.items())
            for name, scale in sorted(scales.items())
        }
        unfinished = folder / "scales.safetensors.tmp"
        save_file(flat, unfinished)
        fsync(unfinished)
        unfinished.replace(folder / "scales.safetensors")
        write_text(folder / "grids.json", json.dumps(self._record(), indent=1) + "\n")

    def _record(self) -> dict[str, Any]:
        return {"version": 1, "preset": self.preset, "tensors": self.grids, "options": self.options}

    @staticmethod
    def load(model: Path) -> Placement | None:
        """That of the model folder `model`; None where the model lies on no grid. Raises IntegrityError."""
        from safetensors.torch import load_file

        folder = model / FOLDER
        if not (folder / "grids.json").exists():
            return None
        record: dict[str, Any] = json.loads((folder / "grids.json").read_text("utf-8"))
        if record.get("version") != 1:
            raise IntegrityError(f"{folder / 'grids.json'} is of version {record.get('version')}, not 1")
        scales: dict[str, dict[str, torch.Tensor]] = {}
        for key, scale in load_file(folder / "scales.safetensors").items():
            tensor, _, name = key.rpartition(_BETWEEN)
            scales.setdefault(tensor, {})[name] = scale
        return Placement(record["tensors"], scales, record["options"], record["preset"])
