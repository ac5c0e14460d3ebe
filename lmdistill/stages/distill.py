"""distill: a student learns from the teacher cache; `loss: ce` is the baseline at equal tokens."""

from __future__ import annotations

import json
import os
import shutil
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmdistill.errors import IntegrityError, LmdistillError, PreflightError, nearest
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, RuntimeKey, Stage, StageConfig, StageContext


class DistillConfig(StageConfig):
    """Keys of `distill`."""

    loss: str = Field(default="decoupled_topk", description="a loss of lmdistill/losses by name; ce is the baseline")
    kd_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="λ: weight of the distillation loss; cross-entropy has the rest"
    )
    mix: Literal["convex", "additive"] = Field(
        default="convex", description="convex: (1−λ)·CE + λ·KD; additive: CE + λ·KD"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="τ inside the teacher's top K")
    mass_weighted: bool = Field(default=True, description="weigh the tempered term with the teacher's top-K mass P")
    hinton_scaled: bool = Field(default=False, description="multiply the tempered term by τ²")
    tokens: Annotated[int, Field(ge=1)] = Field(
        default=1_000_000, description="tokens to train on; more than the cache holds means several epochs"
    )
    batch_rows: Annotated[int, Field(ge=1)] = Field(default=8, description="rows of the cache in an optimiser step")
    lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-3, description="peak step; with lr_scale: relative, in units of each tensor's root mean square"
    )
    lr_scale: Literal["relative", "absolute"] = Field(
        default="relative", description="relative suits grown students, whose tensors differ in scale"
    )
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="of the step size, after warm-up"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.05, description="share of the steps to warm up in")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="decoupled, matrices only")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="AdamW's first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, description="AdamW's second moment")
    clip: Annotated[float, Field(gt=0)] = Field(default=1.0, description="largest norm of the gradient")
    freeze: tuple[str, ...] = Field(default=(), description="globs of parameter names that are not trained")
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of matrix products; weights, optimiser and loss are float32"
    )
    seed: int = Field(default=0, description="of the data order")
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
    chunk: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=512, description="positions whose logits are held at once"
    )
    checkpoint_steps: Annotated[int, RuntimeKey(), Field(ge=1)] = Field(
        default=50, description="steps from one resume point to the next"
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> DistillConfig:
        if self.micro_rows and self.batch_rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} does not divide batch_rows {self.batch_rows}")
        return self

    def weights(self) -> tuple[float, float]:
        """Weights of the distillation loss and of cross-entropy."""
        if self.loss == "ce":
            return 0.0, 1.0
        return self.kd_weight, 1.0 if self.mix == "additive" else 1.0 - self.kd_weight


class DistillStage(Stage[DistillConfig]):
    """Signals and a student in, a trained model out."""

    name = "distill"
    version = 1
    Config = DistillConfig
    inputs = (Input("signals", ("signals",)), Input("student", ("model", "student")))
    output = "model"
    tools = ("torch", "transformers", "accelerate")

    def preflight(self, ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
        """The loss exists. (That student and cache share their tokens is the student stage's to check.)"""
        from lmdistill.losses.registry import names

        problems: list[LmdistillError] = []
        known = names()
        if ctx.config.loss not in known:
            problems.append(
                PreflightError(
                    f"stage '{ctx.name}': no loss is called '{ctx.config.loss}'{nearest(ctx.config.loss, known)}",
                    fix=f"one of: {', '.join(known)}",
                )
            )
        if ctx.config.compile and shutil.which(os.environ.get("CXX", "c++")) is None:
            problems.append(
                PreflightError(
                    f"stage '{ctx.name}': `compile: true` needs a C++ compiler, and there is none",
                    fix="install g++ (or set CXX), or set `compile: false`",
                )
            )
        return problems

    def estimate(self, ctx: PreflightContext[DistillConfig]) -> Estimate:
        """At the pace of a 0.1 B student on two cores; disk for two resume points and the model."""
        return Estimate(
            ctx.config.tokens / 300, 3 * 1_100_000_000, 3_000_000_000, "time for a 0.1 B student on 2 cores"
        )

    def run(self, ctx: StageContext[DistillConfig]) -> dict[str, Any]:
        """Train, then write the model folder and training.json."""
        import torch

        from lmdistill.assets import cache_dir
        from lmdistill.signals.reader import SignalsReader
        from lmdistill.training.run import Place, train

        if ctx.runtime.threads:
            torch.set_num_threads(ctx.runtime.threads)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
        reader = SignalsReader(ctx.one("signals").out)
        student = ctx.one("student").model()
        place = Place(
            student.path, ctx.out / "model", ctx.work / "checkpoints", ctx.runtime.resolve_device(), student.digest
        )
        record = train(reader, _settings(ctx.config, reader.manifest), place, ctx.progress)
        (ctx.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        return {
            "tokens": record["tokens"],
            "steps": record["steps"],
            "parameters": record["parameters"],
            "final": record["log"][-1] if record["log"] else {},
        }

    def verify(self, ctx: StageContext[DistillConfig], metrics: dict[str, Any]) -> None:
        """It trained, and its loss is a number."""
        import math

        if metrics["steps"] < 1:
            raise IntegrityError(f"stage '{ctx.name}' trained for no step", fix="raise `tokens`")
        final = metrics["final"].get("loss")
        if final is not None and not math.isfinite(final):
            raise IntegrityError(f"the loss of '{ctx.name}' is {final}", fix="lower `lr`, or use `precision: float32`")


def _settings(config: DistillConfig, manifest: Any) -> Any:
    from lmdistill.training.run import Settings

    kd_weight, ce_weight = config.weights()
    return Settings(
        loss=config.loss,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        temperature=config.temperature,
        mass_weighted=config.mass_weighted,
        hinton_scaled=config.hinton_scaled,
        tokens=config.tokens,
        batch_rows=config.batch_rows,
        lr=config.lr,
        relative=config.lr_scale == "relative",
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        clip=config.clip,
        precision=config.precision,
        seed=config.seed,
        isolate=manifest.packing == "isolate",
        log_steps=config.log_steps,
        compile=config.compile,
        save_grid=config.save_grid,
        freeze=list(config.freeze),
        micro_rows=config.micro_rows,
        chunk=config.chunk,
        checkpoint_steps=config.checkpoint_steps,
    )
