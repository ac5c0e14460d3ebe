"""on_policy: a student goes on from prompts, its teacher scores those very tokens, the student learns from that."""

from __future__ import annotations

import json
from typing import Any

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.on_policy.samplers import AUTO, SAMPLERS, tools_of
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, Stage, StageContext

SPLIT = "train"  # of the corpus
STUDENT = Input("student", ("model", "student"))


class OnPolicyStage(Stage[OnPolicyConfig]):
    """A model and a corpus of prompts in, a model out."""

    name = "on_policy"
    version = 3
    Config = OnPolicyConfig
    inputs = (STUDENT, Input("corpus", ("corpus",)))
    output = "model"
    tools = ("torch", "transformers", "accelerate", "trl")

    def inputs_for(self, config: OnPolicyConfig) -> tuple[Input, ...]:
        """Prompts of its own need no corpus."""
        return (STUDENT, Input("corpus", ("corpus",), optional=config.prompts is not None))

    def uses_teacher(self, config: OnPolicyConfig) -> bool:
        """It scores every completion."""
        return True

    def tools_used(self, config: OnPolicyConfig) -> tuple[str, ...]:
        """Those of the sampler too."""
        return self.tools + tools_of(config.sampler)

    def choices(self) -> dict[str, dict[str, str]]:
        """The losses that a live teacher can serve, and the samplers."""
        from lmdistill.losses.registry import catalogue

        losses = {name: one.summary for name, one in catalogue().items() if one.signals in ("live", "top_k")}
        auto = {AUTO: "vllm on a GPU where it is installed, else transformers"}
        return {"loss": losses, "sampler": auto | {name: one.summary for name, one in SAMPLERS.items()}}

    def preflight(self, ctx: PreflightContext[OnPolicyConfig]) -> list[LmdistillError]:
        """Loss, sampler, lengths, tokens, prompts."""
        from lmdistill.on_policy.checks import problems

        return problems(ctx)

    def estimate(self, ctx: PreflightContext[OnPolicyConfig]) -> Estimate:
        """From the sizes of student and teacher, where both can be foreseen."""
        from lmdistill.on_policy.cost import estimate

        return estimate(ctx)

    def run(self, ctx: StageContext[OnPolicyConfig]) -> dict[str, Any]:
        """Train, then write the model folder and training.json."""
        import torch

        from lmdistill.on_policy.gathering import gather
        from lmdistill.on_policy.run import train
        from lmdistill.training.run import Place

        if ctx.runtime.threads:
            torch.set_num_threads(ctx.runtime.threads)
        student = ctx.one("student").model()
        prompts = gather(ctx, student.path, SPLIT)
        place = Place(
            student.path,
            ctx.out / "model",
            ctx.work / "checkpoints",
            ctx.runtime.resolve_device(),
            student.digest,
            ctx.need_teacher(),
        )
        record = train(prompts, ctx.config, place, ctx.progress)
        (ctx.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        return {
            "steps": record["steps"],
            "tokens": record["tokens"],
            "parameters": record["parameters"],
            "final": record["log"][-1] if record["log"] else {},
        }

    def verify(self, ctx: StageContext[OnPolicyConfig], metrics: dict[str, Any]) -> None:
        """It made all its steps, on some tokens, and its loss is a number."""
        import math

        if metrics["steps"] != ctx.config.steps:
            raise IntegrityError(f"stage '{ctx.name}' made {metrics['steps']} of {ctx.config.steps} steps")
        final = metrics["final"].get("loss")
        if final is not None and not math.isfinite(final):
            raise IntegrityError(f"the loss of '{ctx.name}' is {final}", fix="lower `lr`, or use `precision: float32`")
