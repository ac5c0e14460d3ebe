"""Trains a student on a teacher cache: from a checkpoint folder and signals to a checkpoint folder and its record."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import ModelRef, Progress
from lmdistill.precision import products_in
from lmdistill.signals.reader import SignalsReader
from lmdistill.training.config import DistillConfig
from lmdistill.training.corpus_rows import CorpusRows
from lmdistill.training.ranks import Ranks, gathered, is_sharded, keep_precision
from lmdistill.training.schedules import scheduled

if TYPE_CHECKING:
    from lmdistill.on_policy.config import OnPolicyConfig
    from lmdistill.quantization.placement import Placement
    from lmdistill.training.batches import Batches

Reader = SignalsReader | CorpusRows


@dataclass(frozen=True)
class Place:
    """Where and on what a run works."""

    student: Path  # model folder to start from
    output: Path  # model folder to write
    work: Path  # checkpoints
    device: str
    student_digest: str
    live_teacher: ModelRef | None = None  # for losses that run the teacher beside the student
    teacher: ModelRef | None = None  # the recipe's, where it has one
    judges: tuple[Path, ...] = ()  # caches of other teachers, for a curriculum that asks them
    corpus: Path | None = None  # for a curriculum by the success rates that came with it
    ranks: Ranks = field(default_factory=Ranks)  # this process among those that train together


def train(reader: Reader, config: DistillConfig, place: Place, progress: Progress) -> dict[str, Any]:
    """Train, resuming from `place.work`, and save to `place.output`; returns the record for training.json.

    Of several processes all train, and the first alone saves and has a record.

    Raises IntegrityError where the checkpoints in `place.work` belong to other data, student or settings,
    PreflightError where the loss cannot learn from this cache.
    """
    from transformers import set_seed

    from lmdistill.intermediate.attach import detach, recorded
    from lmdistill.training.adapter import student_of
    from lmdistill.training.ground_truth import settled
    from lmdistill.training.on_grids import grid_record
    from lmdistill.training.ordering import curriculum_record
    from lmdistill.training.student_forward import detach_loss
    from lmdistill.training.trainer import last_checkpoint

    _check(reader, config, place)
    settings = _semantic(config)
    config, estimate = settled(reader, config, place, progress)
    set_seed(config.seed)
    student = _prepared(config, place, reader)
    trainer = _trainer(student, reader, config, place, progress)
    keep_precision(trainer)
    trainer.train_from(place.ranks.first_then_all(lambda: last_checkpoint(place.work)))
    compared = detach(student_of(student))
    detach_loss(student_of(student))
    model, frozen = _whole(trainer, student, config, place, reader)
    if not place.ranks.first:
        return {}
    lying = grid_record(model, save_settled(model, place, config.save_grid == "float16"))
    parts = ["kd", "ce", *(one["name"] for one in compared)]
    record = _record(reader, config, trainer, frozen, model, parts) | {"settings": settings} | estimate
    record |= {"start": place.student_digest, "text": reader.corpus_digest}
    paced = curriculum_record(config.curriculum, trainer.batches.order_N, place.work)
    return record | recorded(compared, place.student) | paced | lying


def _check(reader: Reader, config: DistillConfig, place: Place) -> None:
    """Raise what `train` does, before anything is loaded; the processes meet here."""
    from lmdistill.training.pairing import check_pair

    check_pair(config.loss, reader.sampled, f"the teacher cache {reader.folder}")
    refuse_other_tokens(reader, place.student)
    place.ranks.meet(place.device)
    if place.ranks.first:
        refuse_foreign_checkpoints(reader, config, place)


def _prepared(config: DistillConfig, place: Place, reader: Reader) -> Any:
    """The student as it is trained: from its folder, on the device, on its grids, in an adapter if one is asked for."""
    from lmdistill.checkpoints import load_model
    from lmdistill.training import adapter, optimizer
    from lmdistill.training.grid_refusals import refuse_converted
    from lmdistill.training.on_grids import put_student

    refuse_converted(place.student, config)
    student = load_model(place.student, device=place.device)
    put_student(student, place, config.quantize, reader)
    optimizer.freeze(student, list(config.freeze))
    if config.compile:
        compile_blocks(student)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return adapter.adapted(student, config.lora) if config.lora else student


def _whole(trainer: Any, student: Any, config: DistillConfig, place: Place, reader: Reader) -> tuple[Any, int]:
    """The trained student without what was put around it, and how many of its weights were frozen."""
    from lmdistill.training import adapter

    if is_sharded(trainer):
        weights = gathered(trainer)  # all processes must take part
        student = _prepared(config.model_copy(update={"compile": False}), replace(place, device="cpu"), reader)
        student.load_state_dict(weights, strict=False)
    plain = adapter.student_of(student)
    frozen = sum(parameter.numel() for parameter in plain.parameters() if not parameter.requires_grad)
    if config.lora and place.ranks.first:
        plain = adapter.merge(student, place.output.parent / "adapter")
    return plain, frozen


def save_settled(model: Any, place: Place, halves: bool) -> Placement | None:
    """Write a trained model, with `halves` rounded to float16 and one on grids lying there; where it lies."""
    from lmdistill.checkpoints import save_model
    from lmdistill.training.on_grids import settle

    placement = settle(model)
    if halves:
        round_matrices(model, placement)
    save_model(model.float(), place.output, tokenizer_from=place.student)
    if placement is not None:
        placement.save(place.output)
    return placement


def compile_blocks(model: Any) -> None:
    """Compile every decoder block by itself: blocks of one kind share their code, so it takes seconds, not minutes."""
    import torch

    # One compilation a kind of block, and some of dynamo's guards name the block's index.
    torch._dynamo.config.recompile_limit = max(64, 2 * len(model.model.layers))
    for block in model.model.layers:
        block.compile(dynamic=False)


def round_matrices(model: Any, placement: Placement | None = None) -> None:
    """Round matrices and taps to the nearest float16, so that an f16 file holds this checkpoint digit for digit.

    Those that lie on a grid of `placement` stay there.

    Raises IntegrityError for a value that float16 cannot hold.
    """
    import torch

    on_grids = placement.on_grids() if placement else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name in on_grids:
                continue
            rounded = parameter.half()
            if not torch.isfinite(rounded).all():
                raise IntegrityError(
                    f"{name} has values beyond float16's {torch.finfo(torch.float16).max:.0f}",
                    fix="set `save_grid: float32`; the checkpoint is then not what an f16 file holds",
                )
            parameter.copy_(rounded)


def refuse_other_tokens(reader: Reader, student: Path) -> None:
    """Raise IntegrityError where the student's tokenizer is not the one the cache's token ids come from."""
    from lmdistill.corpus.tokenizers import tokenizer_digest

    own = tokenizer_digest(student)
    if own != reader.manifest.tokenizer_digest:
        raise IntegrityError(
            f"the teacher cache {reader.folder} was made with another tokenizer than the student in {student}",
            why=f"tokenizer digests {reader.manifest.tokenizer_digest[:12]} (cache) and {own[:12]} (student)",
            fix="run corpus and teach again with the tokenizer that the student has",
        )


def refuse_foreign_checkpoints(reader: Reader, config: DistillConfig, place: Place) -> None:
    """Bind the work folder to this data, student and settings, or refuse it if it is bound to others."""
    from lmdistill.training.ordering import beside

    identity: dict[str, Any] = {
        "signals": reader.digest,
        "student": place.student_digest,
        "settings": _semantic(config),
        "launch": place.ranks.way,
    }
    if place.live_teacher is not None:
        identity["teacher"] = place.live_teacher.digest
    identity |= beside(place)
    bind(place.work, identity)


def bind(work: Path, identity: dict[str, Any]) -> None:
    """Write down whose checkpoints `work` holds; IntegrityError where it holds those of another identity."""
    bound = work / "belongs_to.json"
    if bound.exists():
        other = json.loads(bound.read_text())
        differing = sorted(key for key in identity if other.get(key) != identity[key])
        if differing:
            raise IntegrityError(
                f"the checkpoints in {work} were made with other {', '.join(differing)}",
                why="a run that goes on with other data would skip some of it and be neither",
                fix=f"delete {work} to start this training anew",
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    partial = bound.with_suffix(".tmp")
    partial.write_text(json.dumps(identity, indent=1))
    partial.rename(bound)


def _semantic(config: DistillConfig) -> Any:
    """The keys that change the result, as plain JSON."""
    return semantic(config, str)


def _trainer(model: Any, reader: Reader, config: DistillConfig, place: Place, progress: Progress) -> Any:
    from lmdistill.intermediate.attach import Sources, attach
    from lmdistill.training.adapter import student_of
    from lmdistill.training.batches import batches_of
    from lmdistill.training.data import SignalsCollator
    from lmdistill.training.ordering import data_order
    from lmdistill.training.phases import Phases
    from lmdistill.training.student_forward import attach_loss
    from lmdistill.training.token_batches import OneBatch
    from lmdistill.training.trainer import CheckpointSeal, DistillationTrainer, ProgressReport

    teacher = _live(reader, config, place, model)
    batches = batches_of(
        reader,
        config,
        place.ranks,
        lambda steps: place.ranks.first_then_all(lambda: data_order(reader, config, place, student_of(model), steps)),
    )
    phases = Phases(config, batches.steps)
    live = teacher if config.live else None
    attach_loss(student_of(model), phases.now, config.chunk, live, config.token_weights)
    collator = SignalsCollator(reader, reader.manifest.packing == "isolate", short=bool(config.batch_tokens))
    if config.intermediate:
        sources = Sources(reader, place.student, teacher, place.teacher, own=config.self_teacher is not None)
        collator = attach(
            model, config.intermediate, sources, batches.order_N.tolist(), config.seed, config.loss != "none"
        )
    collator.need_next = config.token_weights is not None
    return DistillationTrainer(
        model=model,
        args=_arguments(config, place, batches),
        train_dataset=batches.dataset,
        data_collator=OneBatch(collator) if config.batch_tokens else collator,
        callbacks=[phases, CheckpointSeal(place.ranks), ProgressReport(progress, batches.tokens_after)],
        batches=batches,
        lr=config.lr,
        relative=config.lr_scale == "relative",
        kind=config.optimizer,
    )


def _live(reader: Reader, config: DistillConfig, place: Place, model: Any) -> Any:
    """The teacher that runs beside the student, for losses that need it; IntegrityError where it has more tokens."""
    if config.own_base or config.self_teacher == "moving":
        from lmdistill.teachers.token_maps import real_vocabulary, token_map
        from lmdistill.training.adapter import BaseTeacher
        from lmdistill.training.on_grids import MovingTeacher

        own = BaseTeacher if config.own_base else MovingTeacher
        return own(model, real_vocabulary(token_map(place.student)))
    if config.self_teacher == "frozen":
        place = replace(place, live_teacher=ModelRef("student", place.student, place.student_digest))
    if place.live_teacher is None:
        return None
    from lmdistill.training.adapter import student_of
    from lmdistill.training.live_teacher import check_head, open_live

    # A student's copy keeps documents apart as far as the student does.
    isolate = reader.manifest.packing == "isolate" and not config.self_teacher
    teacher = open_live(place.live_teacher, place.student, config.precision, place.device, isolate)
    check_head(student_of(model), teacher, place.student)
    return teacher


def _arguments(config: DistillConfig, place: Place, batches: Batches) -> Any:
    from transformers import TrainingArguments

    keys = argument_keys(config, place, batches.steps, batches.micro, batches.accumulated)
    if config.schedule == "warmup_stable_decay":
        decaying = max(1, round(config.decay * batches.steps))
        keys["lr_scheduler_kwargs"] = {"num_decay_steps": decaying, "decay_type": "linear"}
    # Block-local losses leave some weights without a gradient.
    return TrainingArguments(**keys, seed=config.seed, ddp_find_unused_parameters=bool(config.intermediate))


def argument_keys(
    config: DistillConfig | OnPolicyConfig, place: Place, steps: int, micro: int, accumulated: int
) -> dict[str, Any]:
    """Keys of transformers' TrainingArguments; a process takes `micro` rows at once, `accumulated` times a step."""
    on_cpu = place.device == "cpu"
    # A checkpoint lies on a line of the log, so that no line is computed from half an interval after a resume.
    every = max(1, config.checkpoint_steps // config.log_steps) * config.log_steps
    return {
        "output_dir": str(place.work),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": round(config.warmup * steps),
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "max_grad_norm": config.clip,
        "bf16": products_in(config.precision, place.device) == "bfloat16",
        "use_cpu": on_cpu,
        "logging_steps": config.log_steps,
        "logging_nan_inf_filter": False,  # it waits for the device in every step, and hides what verify looks for
        "save_steps": every,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "dataloader_num_workers": 0 if on_cpu else 2,
        "dataloader_persistent_workers": not on_cpu,
        "accelerator_config": {"non_blocking": not on_cpu},
        "report_to": "none",
        "disable_tqdm": True,
    }


def _record(
    reader: Reader, config: DistillConfig, trainer: Any, frozen: int, model: Any, parts: list[str]
) -> dict[str, Any]:
    """What training.json says: settings, digests and the loss curve; nothing that differs from run to run."""
    state, batches = trainer.state, trainer.batches
    log = [
        {"step": line["step"], "tokens": batches.tokens_after(line["step"])}
        | {key: line[key] for key in ("loss", *parts, "grad_norm", "learning_rate") if key in line}
        | scheduled(config, line["step"] - 1, state.max_steps)
        for line in state.log_history
        if "loss" in line
    ]
    return {
        "loss": config.loss,
        "settings": _semantic(config),
        "signals": reader.digest,
        "steps": state.global_step,
        "tokens": batches.tokens_after(state.global_step),
        "epochs": round(len(batches.order_N) / reader.rows, 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "frozen": frozen,
        "log": log,
    }
