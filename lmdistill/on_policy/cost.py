"""What on-policy distillation will cost, as far as the plan tells."""

from __future__ import annotations

import json

from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.pipeline.stage import Estimate, PreflightContext

CPU_FLOPS = 2e11  # operations a second of two laptop cores in bfloat16, in large matrix products
CPU_BYTES = 2e10  # bytes a second from memory: what sampling a token waits for
FULL_ARRAYS = 10  # float32 arrays of [chunk, V] in a loss over the whole vocabulary


def estimate(ctx: PreflightContext[OnPolicyConfig]) -> Estimate:
    """Time on two CPU cores where every completion has its full length; disk; memory."""
    from lmdistill.deployment.planned import parameters_by, student_ahead
    from lmdistill.teachers.planned import WIDTHS, parameters_of

    config = ctx.config
    if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
        return Estimate(note="known when the teacher is on this machine")
    shape = json.loads((ctx.teacher.path / "config.json").read_text())
    student, teacher = parameters_by(student_ahead(ctx, shape)), parameters_of(ctx.teacher.path)
    if student is None:
        return Estimate(note="the student's size is its checkpoint's")
    sequences = config.steps * config.batch_prompts
    tokens = sequences * (config.max_prompt_tokens + config.max_new_tokens)
    passes = config.steps * config.max_new_tokens  # of sampling: each reads all weights
    seconds = tokens * (6 * student + 2 * teacher) / CPU_FLOPS + passes * 4 * student * config.student_share / CPU_BYTES
    logits = FULL_ARRAYS * 4 * config.chunk * shape["vocab_size"]
    return Estimate(
        seconds,
        2 * 12 * student + 4 * student,
        16 * student + WIDTHS[config.precision] * teacher + logits,
        f"{student / 1e6:,.0f} M parameters; time on two CPU cores, with every prompt and completion at its longest",
    )
