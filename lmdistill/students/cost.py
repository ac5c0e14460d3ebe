"""What growing a student costs, before it is done: from the shapes of teacher and student."""

from __future__ import annotations

from typing import Any

from lmdistill.pipeline.stage import Estimate

CPU_FLOPS = 1.6e11  # of two cores with AVX512-BF16, measured on a teacher of 135 M parameters
SCORED_SHARE = 0.6  # of the teacher's blocks run for one candidate: those above the change, and the head
BASE_SECONDS, BASE_MEMORY = 20, 1_500_000_000  # loading, torch, log-probs of the selection rows, hidden states

RANDOM_PER_SECOND, RANDOM_MEMORY = 5e7, 600_000_000  # weights drawn and written; torch and transformers by themselves


def candidates(config: Any, teacher_layers: int) -> int:
    """How many plans are scored: every block in the first round, `selection_width` of them in each later one."""
    local = config.layers - config.attention_layers if config.architecture == "lfm2" else 0
    rounds = [(teacher_layers - config.layers, teacher_layers), (local, config.layers)]
    return sum(first + config.selection_width * (steps - 1) for steps, first in rounds if steps > 0)


def of_growing(config: Any, teacher: dict[str, Any], parameters: int, row_tokens: int) -> Estimate:
    """Time of choosing and fitting blocks of a student with `parameters`, memory of all models at once, disk."""
    embedding = teacher["vocab_size"] * teacher["hidden_size"]
    block = (parameters - embedding) / config.layers
    whole = embedding + block * teacher["num_hidden_layers"]
    scored = candidates(config, teacher["num_hidden_layers"]) * config.selection_rows * row_tokens
    fitted = config.layers * config.fit_steps * config.fit_batch_rows * row_tokens
    operations = 2 * SCORED_SHARE * whole * scored + 6 * block * fitted
    # The teacher, its copy in the student's architecture, that one in bfloat16, and the student.
    memory = 10 * whole + 4 * parameters + BASE_MEMORY
    return Estimate(
        BASE_SECONDS + operations / CPU_FLOPS,
        int(8 * parameters),
        int(memory),
        f"{parameters / 1e6:,.0f} M parameters; time on two CPU cores",
    )


def of_random(parameters: int) -> Estimate:
    """Weights drawn, held once and written in float32."""
    seconds = BASE_SECONDS + parameters / RANDOM_PER_SECOND
    return Estimate(seconds, 4 * parameters, 4 * parameters + RANDOM_MEMORY, f"{parameters / 1e6:,.0f} M parameters")
