"""The keys of `distill`: what a distillation run is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmdistill.curriculum.config import CurriculumConfig
from lmdistill.intermediate.keys import IntermediateKeys
from lmdistill.losses.registry import LossOptions
from lmdistill.pipeline.stage import AddedKey, RuntimeKey, StageConfig
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.training.adapter_keys import LoraKeys
from lmdistill.training.schedules import TemperatureChange, WeightChange
from lmdistill.training.token_keys import TokenWeights


class DistillConfig(StageConfig):
    """Keys of `distill`."""

    loss: str = Field(
        default="decoupled_topk", description="by name, see below; ce is the baseline, full_… run the teacher"
    )
    kd_weight: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default=0.9, description="λ: weight of the distillation loss; cross-entropy has the rest; auto: estimated"
    )
    probe_share: Annotated[float, AddedKey(), Field(gt=0, le=1)] = Field(
        default=0.1, description="`kd_weight: auto`: share of `tokens` in each of the two trainings that it takes"
    )
    mix: Literal["convex", "additive"] = Field(
        default="convex", description="convex: (1−λ)·CE + λ·KD; additive: CE + λ·KD"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="τ of losses that read it")
    kd_weight_schedule: Annotated[WeightChange | None, AddedKey()] = Field(
        default=None, description="where λ goes in training; null: it stays"
    )
    temperature_schedule: Annotated[TemperatureChange | None, AddedKey()] = Field(
        default=None, description="where τ goes in training; null: it stays"
    )
    mass_weighted: bool = Field(default=True, description="weigh the tempered term with the teacher's top-K mass P")
    hinton_scaled: bool = Field(default=False, description="multiply the tempered term by τ²")
    self_normalised: Annotated[bool, AddedKey()] = Field(
        default=False, description="`loss: sampled_kd`: importance weights scaled to sum to 1: biased, less variance"
    )
    js_beta: Annotated[float, AddedKey(), Field(gt=0, lt=1)] = Field(
        default=0.5, description="`loss: js`: β, the teacher's share of the mixture"
    )
    skew_alpha: Annotated[float, AddedKey(), Field(ge=0, lt=1)] = Field(
        default=0.1, description="`loss: skew_kl`, `skew_reverse_kl`: α, the first distribution's share of the mixture"
    )
    bd_weight: Annotated[float, AddedKey(), Field(ge=0.5, le=1)] = Field(
        default=0.75, description="`loss: bd_kd`: weight of the KL that corrects the student's sharpness"
    )
    intermediate: Annotated[tuple[IntermediateKeys, ...], AddedKey()] = Field(
        default=(), description="losses on hidden states, attention relations or blocks, beside the one at the head"
    )
    token_weights: Annotated[TokenWeights | None, AddedKey()] = Field(
        default=None, description="some tokens teach more than others; null: all the same"
    )
    tokens: Annotated[int, Field(ge=1)] = Field(
        default=1_000_000, description="tokens to train on; more than the cache holds means several epochs"
    )
    batch_rows: Annotated[int, Field(ge=1)] = Field(default=8, description="rows of the cache in an optimiser step")
    batch_tokens: Annotated[int | None, AddedKey(), Field(ge=1)] = Field(
        default=None,
        description="tokens in a step, in place of batch_rows: for rows of unequal length (packing: single)",
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-3, description="peak step; with lr_scale: relative, in units of each tensor's root mean square"
    )
    lr_scale: Literal["relative", "absolute"] = Field(
        default="relative", description="relative suits grown students, whose tensors differ in scale"
    )
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"] = Field(
        default="cosine", description="of the step size, after warm-up"
    )
    decay: Annotated[float, AddedKey(), Field(gt=0, le=1)] = Field(
        default=0.2, description="`schedule: warmup_stable_decay`: share of the steps, the last ones, to go to zero in"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.05, description="share of the steps to warm up in")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="decoupled, matrices only")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="AdamW's first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, description="AdamW's second moment")
    optimizer: Annotated[str, AddedKey()] = Field(
        default="adamw", description="adamw, or by name, see below; beta1 and beta2 are those of all of them"
    )
    clip: Annotated[float, Field(gt=0)] = Field(default=1.0, description="largest norm of the gradient")
    freeze: tuple[str, ...] = Field(default=(), description="globs of parameter names that are not trained")
    lora: Annotated[LoraKeys | None, AddedKey()] = Field(
        default=None, description="train a low-rank adapter instead of the weights, and merge it at the end"
    )
    quantize: Annotated[QuantizeKeys | None, AddedKey()] = Field(
        default=None, description="train the student on the grid it ships on; null: it stays where it lies"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of matrix products; weights, optimiser and loss are float32"
    )
    seed: int = Field(default=0, description="of the data order")
    curriculum: Annotated[CurriculumConfig | None, AddedKey()] = Field(
        default=None, description="easy rows first; null: rows in a seeded order"
    )
    log_steps: Annotated[int, Field(ge=1)] = Field(
        default=5, description="steps from one point of the curve to the next"
    )
    compile: bool = Field(
        default=False, description="compile the blocks with torch.compile: faster steps, needs a C++ compiler on CPU"
    )
    save_grid: Literal["float16", "float32"] = Field(
        default="float16", description="float16: matrices are saved rounded to it, and an f16 file is the checkpoint"
    )
    micro_rows: Annotated[int | None, RuntimeKey()] = Field(
        default=None, description="rows at once; the rest of batch_rows is accumulated"
    )
    gradient_checkpointing: Annotated[bool, RuntimeKey()] = Field(
        default=False, description="keep one activation a block and compute the rest again: less memory, more time"
    )
    chunk: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=512, description="positions whose logits are held at once"
    )
    checkpoint_steps: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=50, description="steps from one resume point to the next"
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> DistillConfig:
        if self.micro_rows and not self.batch_tokens and self.batch_rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} does not divide batch_rows {self.batch_rows}")
        return self

    @model_validator(mode="after")
    def _rows_are_whole(self) -> DistillConfig:
        if self.batch_tokens and self.intermediate:
            raise ValueError("intermediate: its losses take rows of one length; drop batch_tokens")
        if self.batch_tokens and self.curriculum:
            raise ValueError("curriculum: its buckets are opened by steps of equal rows; drop batch_tokens")
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> DistillConfig:
        if self.lora and self.freeze:
            raise ValueError("freeze: with lora all weights are frozen but the adapter's; drop one of the two")
        if self.lora and self.intermediate:
            raise ValueError("intermediate: its losses learn beside all of the student; with lora there is no place")
        if self.lora and self.lora.base_teaches and not self.live:
            raise ValueError(f"lora.base_teaches needs a loss that runs a teacher (full_kl); {self.loss} runs none")
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> DistillConfig:
        if self.quantize and self.lora:
            raise ValueError("quantize: its gradient goes to the weights, and with lora they are frozen; drop one")
        if not self.self_teacher:
            return self
        if not self.live and not self.intermediate:
            raise ValueError(
                f"quantize.self_teacher needs a loss that runs a teacher (full_kl, intermediate); {self.loss} runs none"
            )
        if self.intermediate and self.self_teacher == "moving":
            raise ValueError("quantize.self_teacher: moving has no layers of its own to compare with; frozen")
        if not all(entry.runs_teacher and entry.layers != "grown" for entry in self.intermediate):
            raise ValueError(
                "quantize.self_teacher: intermediate losses learn from the student itself, layer by layer; "
                "set `live: true` and `layers: uniform`"
            )
        return self

    @property
    def weight(self) -> float:
        """λ; ValueError where it is still to be estimated."""
        return float(self.kd_weight)

    @property
    def tokens_seen(self) -> float:
        """Tokens of all the trainings that this one takes."""
        return self.tokens * (1 + 2 * self.probe_share if self.kd_weight == "auto" else 1)

    @property
    def live(self) -> bool:
        """Whether the loss at the head needs the teacher itself."""
        return self.loss.startswith("full_")

    @property
    def own_base(self) -> bool:
        """Whether the live teacher is the student's own base, not the recipe's teacher."""
        return self.lora is not None and self.lora.base_teaches

    @property
    def self_teacher(self) -> str | None:
        """Which student in full precision is the live teacher, not the recipe's."""
        return self.quantize.self_teacher if self.quantize else None

    @property
    def runs_teacher(self) -> bool:
        """Whether the recipe's teacher runs beside the student, for any loss."""
        beside = any(entry.runs_teacher for entry in self.intermediate)
        return not self.self_teacher and (beside or (self.live and not self.own_base))

    @property
    def needs_cache(self) -> bool:
        """Whether any loss reads what the teacher said beforehand; else the corpus' rows will do."""
        cached = any(not entry.runs_teacher for entry in self.intermediate)
        return cached or not (self.live or self.loss == "none")

    def options(self) -> LossOptions:
        """What losses read, each of them some."""
        return LossOptions(
            temperature=self.temperature,
            mass_weighted=self.mass_weighted,
            hinton_scaled=self.hinton_scaled,
            self_normalised=self.self_normalised,
            js_beta=self.js_beta,
            skew_alpha=self.skew_alpha,
            bd_weight=self.bd_weight,
        )

    def weights(self, kd_weight: float) -> tuple[float, float]:
        """Weights of the distillation loss and of cross-entropy where λ is `kd_weight`."""
        if self.loss == "none":
            return 0.0, 0.0
        if self.loss == "ce":
            return 0.0, 1.0
        return kd_weight, 1.0 if self.mix == "additive" else 1.0 - kd_weight
