"""A candidate with all that is known of it: its held-out loss, its cost on the device, whether it keeps the budgets.

Scores are kept in a file as they come, by the candidate's digest: a stopped search asks again and gets them back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmdistill.search.candidate import Candidate

RANKED = "kd"  # the loss that candidates are ranked by
_FATES = {"attention": "full", "conv": "local"}


class Device(Protocol):
    """What candidates cost on the device that they are for."""

    def figures(self, candidate: Candidate) -> Mapping[str, float]:
        """decode_ms, ttft_ms, ram_mb and file_mb, all the less the better, and decode_tps."""

    def excess(self, candidate: Candidate) -> Mapping[str, float]:
        """By how much of itself each budget is exceeded, by its name: not above zero where it is kept."""


def plan_of(candidate: Candidate, blocks: int) -> list[str]:
    """What became of each block of the teacher, in the words of a grown student's record."""
    fates = {layer.source: _FATES[layer.operator] for layer in candidate.layers}
    return [fates.get(block, "gone") for block in range(blocks)]


@dataclass(frozen=True)
class Scored:
    """A candidate that was tried."""

    candidate: Candidate
    loss: dict[str, float]  # kd and ce, nats a position
    figures: dict[str, float]
    excess: dict[str, float]

    @property
    def feasible(self) -> bool:
        """Whether it keeps all budgets."""
        return all(value <= 0 for value in self.excess.values())

    def values(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """The loss and the objectives, all to be made small."""
        return (self.loss[RANKED], *(float(self.figures[name]) for name in objectives))

    def to_json(self) -> dict[str, Any]:
        """As it stands in search.json."""
        return {
            "digest": self.candidate.digest,
            "candidate": self.candidate.to_json(),
            "parameters": self.candidate.parameters,
            "loss": self.loss,
            "predicted": self.figures,
            "excess": self.excess,
            "feasible": self.feasible,
        }


class Scores:
    """Scores candidates once each; `file` keeps the losses."""

    def __init__(self, loss_of: Callable[[Candidate], dict[str, float]], device: Device, file: Path) -> None:
        self._loss_of, self._device, self._file = loss_of, device, file
        self._losses: dict[str, dict[str, float]] = dict(map(_parsed, _whole_lines(file)))
        self.new = 0  # scored since this was made

    def of(self, candidate: Candidate) -> Scored:
        """The candidate's score; measured where it is not known."""
        digest = candidate.digest
        if digest not in self._losses:
            loss = {name: round(value, 6) for name, value in self._loss_of(candidate).items()}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([digest, loss]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._losses[digest] = loss
            self.new += 1
        figures = {name: float(value) for name, value in self._device.figures(candidate).items()}
        return Scored(candidate, self._losses[digest], figures, dict(self._device.excess(candidate)))


def _parsed(line: str) -> tuple[str, dict[str, float]]:
    digest, loss = json.loads(line)
    return digest, loss


def _whole_lines(file: Path) -> list[str]:
    """Lines that were written to their ends. What a stopped process left of one is cut off: the next would join it."""
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    return whole.decode("utf-8").splitlines()
