"""What a search will cost, before it starts: from the shapes of teacher and space, and the keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.pipeline.stage import Estimate
from lmdistill.students.cost import CPU_FLOPS, SCORED_SHARE

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import PreflightContext
    from lmdistill.search.config import SearchConfig

BASE_SECONDS, BASE_MEMORY = 40, 1_500_000_000
CUT, SHARED = 6, 12  # copies of the weights in memory at once; shared ones have gradients and moments, too
OPENED_SECONDS = 1  # to write a timed file and to open it
ALONE = 3  # times what a token of a prompt takes, where it is generated: all weights are read for it alone
WEIGHTS, CHECKPOINT = 4, 12  # bytes a parameter: in a file; in a checkpoint, with Adam's moments


def of_search(ctx: PreflightContext[SearchConfig]) -> Estimate:
    """Time of timing, ranking, fitting, training and scoring; memory and disk of super-network and optimiser."""
    if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
        return Estimate(note="known when the teacher is on this machine")
    from lmdistill.search.design import teacher_candidate
    from lmdistill.search.space_problems import open_space

    config = ctx.config
    teacher = json.loads((ctx.teacher.path / "config.json").read_text())
    space, found = open_space(config.space, teacher, config.timing.format)
    if space is None or found:
        return Estimate(note="known when the space fits the teacher")
    shapes = space.shapes()
    smallest, largest = (space.evenly(shape).parameters for shape in (shapes[0], shapes[-1]))
    whole, middle = teacher_candidate(teacher).parameters, (smallest + largest) / 2
    convolutions = 4 * space.blocks * teacher["hidden_size"] ** 2 if config.space.hybrid else 0
    weights = whole + convolutions
    length = getattr(ctx.one("corpus").config, "sequence_length", 1024)
    operations = _of_teacher(config, space.blocks, length) * whole + _of_candidates(config, length) * middle
    return Estimate(
        BASE_SECONDS + _timing(config, middle) + operations / CPU_FLOPS,
        _disk(config, weights, largest, length),
        int(WEIGHTS * weights * (CUT if config.method == "prune" else SHARED) + BASE_MEMORY),
        f"{weights / 1e6:,.0f} M shared parameters; time on two CPU cores",
    )


def _timing(config: SearchConfig, middle: float) -> float:
    """Seconds of timing on this machine: files × rounds × tokens, with a round to warm up.

    Files are the shapes, the teacher, one shortlist, and beside each group of them the reference.
    """
    if isinstance(config.device, Path):
        return 0.0
    timing = config.timing
    files = (timing.candidates + 1 + config.finalists.count) * (1 + 1 / timing.together)
    tokens = sum(timing.plan.prompts) + ALONE * timing.bursts * timing.decode
    return files * (OPENED_SECONDS + (timing.rounds + 1) * tokens * 2 * middle / CPU_FLOPS)


def _of_teacher(config: SearchConfig, blocks: int, length: int) -> float:
    """Operations for each of the teacher's parameters: ranking its blocks, ranking their units, fitting."""
    keys = config.supernet
    ranked = 2 * blocks * (1 + config.selection_width / 2) * config.selection_rows * length
    fits = keys.fit_steps + _fitted(config) * config.finalists.fit_steps
    return 2 * (SCORED_SHARE * ranked + keys.importance_rows * length) + 6 * fits * keys.fit_batch_rows * length


def _of_candidates(config: SearchConfig, length: int) -> float:
    """Operations for each parameter of a middling candidate: shared training, scores, finalists' rounds."""
    subs, shared = max(1, len(config.space.sub_spaces)), config.method != "prune"
    tried = config.evolution.population * (config.evolution.generations if shared else 1) * subs
    trained = config.supernet.tokens * (2 + config.supernet.random_candidates) * subs if shared else 0
    trained += sum(left * tokens for left, tokens in _rounds(config))
    return 6 * trained + 2 * tried * config.heldout_rows * length


def _fitted(config: SearchConfig) -> int:
    """How many finalists have their blocks fitted."""
    return 1 if config.weights == "fitted" else config.finalists.count


def _rounds(config: SearchConfig) -> list[tuple[int, int]]:
    """How many finalists train in each round of halving, and on how many tokens each."""
    found, left, tokens = [], config.finalists.count, config.finalists.tokens
    while left > 1:
        found.append((left, tokens))
        left, tokens = -(-left // 2), 2 * tokens
    return found


def _left(config: SearchConfig, tokens: int, length: int) -> int:
    """Bytes a parameter that a training leaves: its model, and the last two of its checkpoints or the only one."""
    distilling = config.distilling(tokens)
    steps = -(-tokens // (distilling.batch_rows * length))
    every = max(1, distilling.checkpoint_steps // distilling.log_steps) * distilling.log_steps
    return WEIGHTS + CHECKPOINT * min(2, -(-steps // every))


def _disk(config: SearchConfig, weights: int, largest: int, length: int) -> int:
    """Bytes of the work folder and the artefact, at most: each training leaves its model and checkpoints.

    Before any, there are the fitted convolutions and the super-network as it was made.
    """
    subs, finalists = max(1, len(config.space.sub_spaces)), config.finalists
    each = _left(config, config.supernet.tokens, length) + WEIGHTS * config.supernet.keep
    shared = subs * each if config.method != "prune" else 0
    fits = _fitted(config) if finalists.fit_steps else 0
    begun = WEIGHTS * (finalists.count + 2 * fits + (config.weights == "fitted"))  # blocks, then a model with them
    trained = sum(left * _left(config, tokens, length) for left, tokens in _rounds(config))
    return weights * (2 * WEIGHTS + shared) + largest * (begun + trained + WEIGHTS)
