"""Trains a student on its own completions: from a checkpoint folder and prompts to a checkpoint and its record."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from lmdistill.corpus.build import model_maximum
from lmdistill.errors import IntegrityError
from lmdistill.on_policy import samplers
from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.on_policy.prompts import Prompt, digest
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import ModelRef, Progress
from lmdistill.quantization.placement import FOLDER
from lmdistill.training.run import Place, argument_keys, bind, save_settled


def train(prompts: Sequence[Prompt], config: OnPolicyConfig, place: Place, progress: Progress) -> dict[str, Any]:
    """Train on `prompts`, resuming from `place.work`, and save to `place.output`; returns the record for training.json.

    Raises IntegrityError where the checkpoints in `place.work` belong to other prompts, models or settings, or where
    prompt and completion do not fit into a model; PreflightError where the sampler cannot run here.
    """
    from transformers import set_seed

    from lmdistill.checkpoints import load_model
    from lmdistill.quantization.on_grid import kept_on_its_grids
    from lmdistill.training import optimizer
    from lmdistill.training.live_teacher import check_head, open_live
    from lmdistill.training.trainer import last_checkpoint

    teacher = _teacher(place)
    _check_lengths(config, place, teacher)
    identity = {"prompts": digest(prompts), "student": place.student_digest, "teacher": teacher.digest}
    bind(place.work, identity | {"settings": semantic(config, str)})
    set_seed(config.seed)
    model = load_model(place.student, device=place.device)
    kept_on_its_grids(model, place.student)
    before = deepcopy((model.config, model.generation_config))
    frozen = optimizer.freeze(model, list(config.freeze))
    engine = open_live(teacher, place.student, config.precision, place.device, isolate=False)
    check_head(model, engine, place.student)
    trainer = _trainer(model, engine, prompts, config, place, progress)
    trainer.train_from(last_checkpoint(place.work))
    model.config, model.generation_config = before  # TRL sets the padding token
    save_settled(model, place, config.save_grid == "float16")
    return _record(identity["prompts"], config, trainer.state, frozen, model)


def _teacher(place: Place) -> ModelRef:
    assert place.live_teacher is not None  # the stage gives it
    return place.live_teacher


def _check_lengths(config: OnPolicyConfig, place: Place, teacher: ModelRef) -> None:
    longest = config.max_prompt_tokens + config.max_new_tokens
    for name, folder in (("student", place.student), ("teacher", teacher.path)):
        maximum = model_maximum(folder)
        if maximum is not None and longest > maximum:
            raise IntegrityError(
                f"prompts and completions of up to {longest} tokens are above the {name}'s maximum of {maximum}",
                fix="lower `max_prompt_tokens` or `max_new_tokens`",
            )


def _trainer(
    model: Any, engine: Any, prompts: Sequence[Prompt], config: OnPolicyConfig, place: Place, progress: Progress
) -> Any:
    from lmdistill.checkpoints import load_tokenizer
    from lmdistill.losses import registry
    from lmdistill.losses.fused_head import Mix
    from lmdistill.on_policy.trainer import OnPolicyTrainer, PromptDataset
    from lmdistill.training.trainer import CheckpointSeal, ProgressReport

    live = registry.signals_of(config.loss) == "live"
    return OnPolicyTrainer(
        model=model,
        args=_arguments(config, place),
        train_dataset=PromptDataset(prompts),
        processing_class=load_tokenizer(place.student),
        callbacks=[CheckpointSeal(), ProgressReport(progress, lambda steps: steps * config.batch_prompts, "prompt")],
        lr=config.lr,
        relative=config.lr_scale == "relative",
        teacher=engine,
        mix=Mix(registry.get(config.loss), config.options(), 1.0, 0.0),
        k=0 if live else min(config.k, engine.vocab_size),
        chunk=config.chunk,
        student_share=config.student_share,
    )


def _arguments(config: OnPolicyConfig, place: Place) -> Any:
    from trl import DistillationConfig

    on_grid = (place.student / FOLDER).exists()
    chosen = samplers.SAMPLERS[samplers.choose(config.sampler, place.device, on_grid)]
    micro, accumulated = place.ranks.share_of(config.batch_prompts, config.micro_prompts)
    keys = argument_keys(config, place, config.steps, micro, accumulated)
    return DistillationConfig(
        **keys | {"dataloader_num_workers": 0},  # prompts are in memory already
        **chosen.arguments(config),
        seed=config.seed % 2**32,
        temperature=config.sampling_temperature,
        max_completion_length=config.max_new_tokens,
        shuffle_dataset=False,
        gradient_checkpointing=False,
    )


def _record(prompts: str, config: OnPolicyConfig, state: Any, frozen: int, model: Any) -> dict[str, Any]:
    """What training.json says: settings, digests and the loss curve; nothing that differs from run to run."""
    log, tokens, past = [], 0, 0
    for line in (line for line in state.log_history if "loss" in line):
        tokens, past = tokens + round(line["said"] * (line["step"] - past)), line["step"]
        kept = {key: line[key] for key in ("loss", "kd", "ce", "grad_norm", "learning_rate")}
        log.append({"step": past, "tokens": tokens} | kept | {"completion": line["said"] / config.batch_prompts})
    return {
        "loss": config.loss,
        "settings": semantic(config, str),
        "prompts": prompts,
        "steps": state.global_step,
        "tokens": tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "frozen": frozen,
        "log": log,
    }
