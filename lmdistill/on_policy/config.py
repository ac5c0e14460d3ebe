"""The keys of `on_policy`: prompts, sampling, loss, and those of every training."""

from __future__ import annotations

from copy import copy
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmdistill.corpus.config import Source
from lmdistill.losses.registry import LossOptions
from lmdistill.pipeline.stage import RuntimeKey, StageConfig
from lmdistill.training.config import DistillConfig


def _as_in_distill(name: str) -> Any:
    """The key of this name as `distill` has it: default, limits, description, and whether it is a runtime key."""
    return copy(DistillConfig.model_fields[name])


class OnPolicyConfig(StageConfig):
    """Keys of `on_policy`."""

    loss: str = Field(
        default="full_reverse_kl",
        description="by name, see below: full_… compare whole vocabularies, others the teacher's top K and the rest",
    )
    k: Annotated[int, Field(ge=1)] = Field(
        default=64, description="teacher's entries at a position, for losses on its top K"
    )
    js_beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="`loss: js`, `full_js`: β, the teacher's share of the mixture"
    )
    skew_alpha: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="skew losses: α, the first distribution's share of the mixture"
    )
    prompts: Source | None = Field(
        default=None, description="records to take prompts from, a text or a conversation each; null: the corpus'"
    )
    student_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="share of steps on the student's own completions; the others take the corpus'"
    )
    sampling_temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="at which the student samples; the loss is at 1"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(default=128, description="longest completion")
    max_prompt_tokens: Annotated[int, Field(ge=1)] = Field(
        default=512, description="longest prompt; longer ones are left out"
    )
    prompt_tokens: Annotated[int, Field(ge=1)] = Field(
        default=32, description="in a corpus of plain text: how much of a document is its prompt"
    )
    batch_prompts: Annotated[int, Field(ge=1)] = Field(default=8, description="prompts in an optimiser step")
    steps: Annotated[int, Field(ge=1)] = Field(default=100, description="optimiser steps")
    lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-4, description="peak step; with lr_scale: relative, in units of each tensor's root mean square"
    )
    lr_scale: Literal["relative", "absolute"] = _as_in_distill("lr_scale")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _as_in_distill("schedule")
    warmup: float = _as_in_distill("warmup")
    weight_decay: float = _as_in_distill("weight_decay")
    beta1: float = _as_in_distill("beta1")
    beta2: float = _as_in_distill("beta2")
    clip: float = _as_in_distill("clip")
    freeze: tuple[str, ...] = _as_in_distill("freeze")
    precision: Literal["float32", "bfloat16"] = _as_in_distill("precision")
    save_grid: Literal["float16", "float32"] = _as_in_distill("save_grid")
    log_steps: int = _as_in_distill("log_steps")
    checkpoint_steps: int = _as_in_distill("checkpoint_steps")
    seed: int = Field(default=0, description="of the prompts' order and of every step's sampling")
    sampler: str = Field(default="auto", description="by name, see below; auto: vllm on a GPU where it is installed")
    vllm_memory: Annotated[float, RuntimeKey(), Field(gt=0, le=1)] = Field(
        default=0.3, description="`sampler: vllm`: its share of the GPU's memory"
    )
    micro_prompts: Annotated[int | None, RuntimeKey()] = Field(
        default=None, description="prompts in one forward; the rest of batch_prompts is accumulated"
    )
    chunk: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=128, description="positions whose logits are held at once"
    )

    @model_validator(mode="after")
    def _consistent(self) -> OnPolicyConfig:
        if self.micro_prompts and self.batch_prompts % self.micro_prompts:
            raise ValueError(f"micro_prompts {self.micro_prompts} does not divide batch_prompts {self.batch_prompts}")
        if self.prompts is not None and self.student_share < 1:
            raise ValueError("`prompts` have no completions: student_share must be 1, or take the corpus' prompts")
        return self

    def options(self) -> LossOptions:
        """What losses read, each of them some."""
        return LossOptions(js_beta=self.js_beta, skew_alpha=self.skew_alpha)
