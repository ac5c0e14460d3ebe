"""Sandwich training of a super-network (AutoDistil, NeurIPS 2022): every step trains the largest, the smallest and some
random candidates on the same rows, and their gradients add up.

The candidates of a step follow from the seed and the step alone: they are the same in every process, and after a
resume.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lmdistill.pipeline.stage import Progress
from lmdistill.search.candidate import Candidate
from lmdistill.search.heldout import TrainingRows
from lmdistill.search.ranking import Ranking
from lmdistill.search.space import shape_of
from lmdistill.search.sub_space import SubSpace
from lmdistill.search.supernet import Prepare, SuperNet
from lmdistill.training.config import DistillConfig
from lmdistill.training.run import Place, argument_keys, bind
from lmdistill.training.trainer import DistillationTrainer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lmdistill.search.config import RelationKeys
    from lmdistill.training.phases import Phases

Chooser = Callable[[int], list[Candidate]]
TRAINED, LOG = "trained.safetensors", "log.json"


@dataclass(frozen=True)
class Sandwich:
    """Which candidates a step trains."""

    sub: SubSpace
    ranking: Ranking
    random_candidates: int
    noise: float
    seed: int

    def candidates(self, step: int) -> list[Candidate]:
        """The largest and the smallest shape on their ranked blocks, then random shapes on blocks near those."""
        rng = random.Random(f"{self.seed} {step}")
        space = self.sub.space
        ends = [shape_of(self.sub.largest()), shape_of(self.sub.smallest())]
        found = [self.ranking.candidate(shape, space) for shape in dict.fromkeys(ends)]
        for _ in range(self.random_candidates):
            shape = shape_of(self.sub.sample(rng))
            found.append(self.ranking.candidate(shape, space, rng, self.noise))
        return found


class SandwichTrainer(DistillationTrainer):
    """Several candidates a step; everything else is distill's."""

    def __init__(self, net: SuperNet, choose: Chooser, phases: Phases, callbacks: list[Any], **kwargs: Any) -> None:
        super().__init__(model=net, callbacks=[phases, *callbacks], **kwargs)
        self.phases, self._net, self._choose = phases, net, choose

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of each candidate of this step; the sum of their shares of the loss."""
        candidates = self._choose(self.state.global_step)
        self._net.share = 1 / len(candidates)
        losses = []
        for candidate in candidates:
            self._net.candidate = candidate
            losses.append(super().training_step(model, dict(inputs), num_items_in_batch))
        return torch.stack(losses).sum()


def train_supernet(
    net: SuperNet,
    choose: Chooser,
    reader: TrainingRows,
    config: DistillConfig,
    place: Place,
    progress: Progress,
    relations: RelationKeys | None = None,
) -> list[dict[str, float]]:
    """Train in place, resuming from `place.work`; returns the curve. A finished training is taken from there.

    With `relations` the teacher of `place` runs beside it.
    """
    from lmdistill.pipeline.files import write_json
    from lmdistill.training.trainer import last_checkpoint

    done, log = place.work / TRAINED, place.work / LOG
    if not log.exists():
        place.ranks.meet(place.device)
        if place.ranks.first:
            bind(place.work, {"signals": reader.digest, "held_out": reader.held_out, "search": place.student_digest})
        trainer = _trainer(net, choose, reader, config, place, progress)
        net.prepare_with(_prepared(trainer.phases, reader, config, place, relations))
        trainer.train_from(place.ranks.first_then_all(lambda: last_checkpoint(place.work)))
        if place.ranks.first:
            partial = done.with_suffix(".tmp")
            save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, partial)
            partial.rename(done)
            write_json(log, _curve(trainer))
        place.ranks.wait()
    net.load_state_dict(load_file(done, device=place.device))
    net.share, net.candidate = 1.0, None
    curve: list[dict[str, float]] = json.loads(log.read_text())
    return curve


def _prepared(
    phases: Phases, reader: TrainingRows, config: DistillConfig, place: Place, relations: RelationKeys | None
) -> Prepare:
    """What makes a candidate's model ready to be trained."""
    from lmdistill.training.student_forward import attach_loss

    beside = None
    if relations is not None:
        from lmdistill.search.relations import Relations

        assert place.live_teacher is not None
        isolate = reader.manifest.packing == "isolate"
        beside = Relations(relations, place.live_teacher, config.precision, place.device, isolate)

    def prepare(model: Any) -> None:
        attach_loss(model, phases.now, config.chunk)
        if beside is not None:
            beside.attach(model)

    return prepare


def _curve(trainer: Any) -> list[dict[str, float]]:
    return [
        {"step": line["step"], "tokens": trainer.batches.tokens_after(line["step"])}
        | {key: line[key] for key in ("loss", "kd", "ce", "relations") if key in line}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def rows_from_the_end(reader: TrainingRows, wanted: int, seed: int) -> NDArray[np.int64]:
    """Row numbers `[N]`: a distillation from this cache with this seed sees the first of them last.

    Shared weights learn their rows by heart; what the winner is distilled on first shall be new to it.
    """
    from lmdistill.training.data import row_order

    whole, epochs = reader.rows + reader.held_out, -(-wanted // reader.rows)
    order_N = row_order(whole, epochs * whole, seed).reshape(epochs, whole)[:, ::-1].ravel()
    return order_N[order_N < reader.rows][:wanted]


def _trainer(
    net: SuperNet, choose: Chooser, reader: TrainingRows, config: DistillConfig, place: Place, progress: Progress
) -> SandwichTrainer:
    from transformers import TrainingArguments, set_seed

    from lmdistill.training.batches import batches_of
    from lmdistill.training.data import SignalsCollator
    from lmdistill.training.phases import Phases
    from lmdistill.training.trainer import CheckpointSeal, ProgressReport

    set_seed(config.seed)
    batches = batches_of(
        reader, config, place.ranks, lambda steps: rows_from_the_end(reader, steps * config.batch_rows, config.seed)
    )
    keys = argument_keys(config, place, batches.steps, batches.micro, batches.accumulated)
    return SandwichTrainer(
        net,
        choose,
        Phases(config, batches.steps),
        [CheckpointSeal(place.ranks), ProgressReport(progress, batches.tokens_after)],
        # A step's candidates leave blocks out, and with them their weights.
        args=TrainingArguments(**keys, seed=config.seed, ddp_find_unused_parameters=True),
        train_dataset=batches.dataset,
        data_collator=SignalsCollator(reader, reader.manifest.packing == "isolate"),
        batches=batches,
        lr=config.lr,
        relative=config.lr_scale == "relative",
        kind=config.optimizer,
    )
