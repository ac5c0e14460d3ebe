"""Trains a student on a teacher cache: from a checkpoint folder and signals to a checkpoint folder and its record."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.stage import Progress
from lmdistill.signals.reader import SignalsReader


@dataclass(frozen=True)
class Settings:
    """What a distillation run is; all of it changes the result but the last three."""

    loss: str
    kd_weight: float
    ce_weight: float
    temperature: float
    mass_weighted: bool
    hinton_scaled: bool
    tokens: int
    batch_rows: int
    lr: float
    relative: bool
    schedule: str
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    precision: str
    seed: int
    isolate: bool
    log_steps: int
    compile: bool
    save_grid: str
    freeze: list[str] = field(default_factory=list)
    micro_rows: int | None = None
    chunk: int = 256
    checkpoint_steps: int = 50


RUNTIME_ONLY = ("micro_rows", "chunk", "checkpoint_steps")


@dataclass(frozen=True)
class Place:
    """Where and on what a run works."""

    student: Path  # model folder to start from
    output: Path  # model folder to write
    work: Path  # checkpoints
    device: str
    student_digest: str


def steps_of(settings: Settings, row_tokens: int) -> int:
    """Optimiser steps that `tokens` make, at least one."""
    return max(1, settings.tokens // (settings.batch_rows * row_tokens))


def train(reader: SignalsReader, settings: Settings, place: Place, progress: Progress) -> dict[str, Any]:
    """Train, resuming from `place.work`, and save to `place.output`; returns the record for training.json.

    Raises IntegrityError where the checkpoints in `place.work` belong to other data, student or settings.
    """
    from transformers import set_seed

    from lmdistill.checkpoints import load_model, save_model
    from lmdistill.training import optimizer
    from lmdistill.training.trainer import last_checkpoint

    set_seed(settings.seed)
    refuse_other_tokens(reader, place.student)
    refuse_foreign_checkpoints(reader, settings, place)
    model = load_model(place.student, device=place.device)
    frozen = optimizer.freeze(model, settings.freeze)
    if settings.compile:
        compile_blocks(model)
    trainer = _trainer(model, reader, settings, place, progress)
    trainer.train_from(last_checkpoint(place.work))
    model.__dict__.pop("forward")
    if settings.save_grid == "float16":
        round_matrices(model)
    save_model(model.float(), place.output, tokenizer_from=place.student)
    return _record(reader, settings, trainer.state, frozen, model)


def compile_blocks(model: Any) -> None:
    """Compile every decoder block by itself: blocks of one kind share their code, so it takes seconds, not minutes."""
    import torch

    # One compilation a kind of block, and some of dynamo's guards name the block's index.
    torch._dynamo.config.recompile_limit = max(64, 2 * len(model.model.layers))
    for block in model.model.layers:
        block.compile(dynamic=False)


def round_matrices(model: Any) -> None:
    """Round matrices and taps to the nearest float16, so that an f16 file holds this checkpoint digit for digit."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())


def refuse_other_tokens(reader: SignalsReader, student: Path) -> None:
    """Raise IntegrityError where the student's tokenizer is not the one the cache's token ids come from."""
    from lmdistill.corpus.tokenizers import tokenizer_digest

    own = tokenizer_digest(student)
    if own != reader.manifest.tokenizer_digest:
        raise IntegrityError(
            f"the teacher cache {reader.folder} was made with another tokenizer than the student in {student}",
            why=f"tokenizer digests {reader.manifest.tokenizer_digest[:12]} (cache) and {own[:12]} (student)",
            fix="run corpus and teach again with the tokenizer that the student has",
        )


def refuse_foreign_checkpoints(reader: SignalsReader, settings: Settings, place: Place) -> None:
    """Bind the work folder to this data, student and settings, or refuse it if it is bound to others."""
    semantic = {key: value for key, value in asdict(settings).items() if key not in RUNTIME_ONLY}
    identity = {"signals": reader.digest, "student": place.student_digest, "settings": semantic}
    identity = json.loads(json.dumps(identity))
    bound = place.work / "belongs_to.json"
    if bound.exists():
        other = json.loads(bound.read_text())
        differing = sorted(key for key in identity if other.get(key) != identity[key])
        if differing:
            raise IntegrityError(
                f"the checkpoints in {place.work} were made with other {', '.join(differing)}",
                why="a run that goes on with other data would skip some of it and be neither",
                fix=f"delete {place.work} to start this training anew",
            )
        return
    place.work.mkdir(parents=True, exist_ok=True)
    partial = bound.with_suffix(".tmp")
    partial.write_text(json.dumps(identity, indent=1))
    partial.rename(bound)


def _trainer(model: Any, reader: SignalsReader, settings: Settings, place: Place, progress: Progress) -> Any:
    from lmdistill.losses import registry
    from lmdistill.losses.fused_head import Mix
    from lmdistill.losses.registry import LossOptions
    from lmdistill.training.data import RowDataset, SignalsCollator, row_order
    from lmdistill.training.student_forward import attach_loss
    from lmdistill.training.trainer import CheckpointSeal, DistillationTrainer, ProgressReport

    options = LossOptions(settings.temperature, settings.mass_weighted, settings.hinton_scaled)
    mix = Mix(registry.get(settings.loss), options, settings.kd_weight, settings.ce_weight)
    attach_loss(model, mix, settings.chunk)
    steps = steps_of(settings, reader.row_tokens)
    order = row_order(reader.rows, steps * settings.batch_rows, settings.seed)
    return DistillationTrainer(
        model=model,
        args=_arguments(settings, place, steps),
        train_dataset=RowDataset(order),
        data_collator=SignalsCollator(reader, settings.isolate),
        callbacks=[CheckpointSeal(), ProgressReport(progress, settings.batch_rows * reader.row_tokens)],
        lr=settings.lr,
        relative=settings.relative,
    )


def _arguments(settings: Settings, place: Place, steps: int) -> Any:
    from transformers import TrainingArguments

    micro = settings.micro_rows or settings.batch_rows
    # A checkpoint lies on a line of the log, so that no line is computed from half an interval after a resume.
    every = max(1, settings.checkpoint_steps // settings.log_steps) * settings.log_steps
    return TrainingArguments(
        output_dir=str(place.work),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_rows // micro,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bfloat16",
        use_cpu=place.device == "cpu",
        seed=settings.seed,
        logging_steps=settings.log_steps,
        save_steps=every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=place.device != "cpu",
        dataloader_num_workers=0 if place.device == "cpu" else 2,
        report_to="none",
        disable_tqdm=True,
    )


def _record(reader: SignalsReader, settings: Settings, state: Any, frozen: int, model: Any) -> dict[str, Any]:
    """What training.json says: settings, digests and the loss curve; nothing that differs from run to run."""
    per_step = settings.batch_rows * reader.row_tokens
    log = [
        {"step": line["step"], "tokens": line["step"] * per_step}
        | {key: line[key] for key in ("loss", "kd", "ce", "grad_norm", "learning_rate") if key in line}
        for line in state.log_history
        if "loss" in line
    ]
    semantic = {key: value for key, value in asdict(settings).items() if key not in RUNTIME_ONLY}
    return {
        "loss": settings.loss,
        "settings": semantic,
        "signals": reader.digest,
        "steps": state.global_step,
        "tokens": state.global_step * per_step,
        "epochs": round(state.global_step * settings.batch_rows / reader.rows, 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "frozen": frozen,
        "log": log,
    }
