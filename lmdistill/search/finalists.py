"""Successive halving: a few candidates train for a short while, the better half trains on, until one is left.

What a candidate's inherited weights promise is only a promise; a short distillation asks again where it matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.stage import Progress
from lmdistill.search.front import front
from lmdistill.search.heldout import HeldOutLoss, TrainingRows
from lmdistill.search.scored import RANKED, Scored
from lmdistill.training.config import DistillConfig
from lmdistill.training.run import Place, train


@dataclass
class Finalist:
    """A candidate in training."""

    scored: Scored
    folder: Path  # its model: inherited/, cut/ from the teacher, fitted/ where that was tried, after-N/ of round N
    fitted: dict[str, float] | None = None  # kd and ce after its blocks were fitted to the teacher's
    rounds: list[dict[str, float]] = field(default_factory=list)  # tokens so far, kd, ce

    @property
    def loss(self) -> float:
        """The held-out loss that it was last seen with."""
        if self.rounds:
            return self.rounds[-1][RANKED]
        return min(one[RANKED] for one in (self.scored.loss, self.fitted) if one is not None)

    @property
    def inherited(self) -> Path:
        """Its model as it is in the super-network."""
        return self.folder / "inherited"

    @property
    def cut(self) -> Path:
        """Its model as the teacher's weights make it, where that is asked for."""
        return self.folder / "cut"

    @property
    def begun(self) -> Path:
        """What its blocks are fitted from."""
        return self.cut if self.cut.exists() else self.inherited

    @property
    def bridged(self) -> Path:
        """Its model with fitted blocks."""
        return self.folder / "fitted"

    @property
    def newest(self) -> Path:
        """Its model as it is by now."""
        return self.folder / f"after-{len(self.rounds)}" if self.rounds else self.start

    @property
    def start(self) -> Path:
        """Its model before any round: inherited, or fitted where that is the better one."""
        better = self.fitted is not None and self.fitted[RANKED] < self.scored.loss[RANKED]
        return self.bridged if better else self.inherited


def chosen(scored: Sequence[Scored], objectives: Sequence[str], count: int) -> list[Scored]:
    """Those that go on: from the front the lowest losses; where it is short, the lowest losses of the others."""
    feasible = {one.candidate.digest: one for one in scored if one.feasible}
    best = front(scored, objectives)[:count]
    rest = [one for digest, one in feasible.items() if all(digest != other.candidate.digest for other in best)]
    return best + sorted(rest, key=lambda one: (one.loss[RANKED], one.candidate.digest))[: count - len(best)]


@dataclass(frozen=True)
class Halving:
    """What the rounds are made with."""

    reader: TrainingRows
    config: DistillConfig  # `tokens` are those of the first round
    heldout: HeldOutLoss
    device: str
    progress: Progress


def halve(finalists: list[Finalist], how: Halving) -> list[Finalist]:
    """All finalists, the winner first, each with its rounds; a round that is done is taken from its folder."""
    left, tokens = list(finalists), how.config.tokens
    out: list[Finalist] = []
    while len(left) > 1:
        for place, finalist in enumerate(left):
            finalist.rounds.append(_round(finalist, tokens, how))
            how.progress.update(place + 1, len(left), "finalists trained", kd=round(finalist.loss, 4))
        left.sort(key=lambda one: (one.loss, one.scored.candidate.digest))
        keep = -(-len(left) // 2)
        out = left[keep:] + out
        left, tokens = left[:keep], 2 * tokens
    return left + out


def _round(finalist: Finalist, tokens: int, how: Halving) -> dict[str, float]:
    """Train one finalist for a round, score it, keep both."""
    number = len(finalist.rounds) + 1
    folder = finalist.folder / f"after-{number}"
    kept = finalist.folder / f"after-{number}.json"
    if not kept.exists():
        config = how.config.model_copy(update={"tokens": tokens, "seed": how.config.seed + number})
        work = finalist.folder / f"work-{number}"
        identity = f"{finalist.scored.candidate.digest} {number}"
        record = train(how.reader, config, Place(finalist.newest, folder, work, how.device, identity), how.progress)
        before = finalist.rounds[-1]["tokens"] if finalist.rounds else 0
        loss = {name: round(value, 6) for name, value in how.heldout.of_folder(folder).items()}
        write_json(kept, {"tokens": before + record["tokens"], **loss})
    done: dict[str, float] = json.loads(kept.read_text())
    return done


def prepare(scored: Sequence[Scored], work: Path, extract: Callable[[Scored], Any], tokenizer: Path) -> list[Finalist]:
    """Write the inherited model of each, once."""
    found = [Finalist(one, work / one.candidate.digest[:16]) for one in scored]
    for finalist in found:
        written(finalist.inherited, lambda one=finalist: extract(one.scored), tokenizer)  # type: ignore[misc]
    return found


def written(folder: Path, extract: Callable[[], Any], tokenizer: Path) -> None:
    """Write a model, once."""
    from lmdistill.checkpoints import save_model

    if not (folder / "tokenizer.json").exists():  # copied last
        save_model(extract().float().cpu(), folder, tokenizer_from=tokenizer)
