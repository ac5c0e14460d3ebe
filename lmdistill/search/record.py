"""What a search leaves behind: the student, how it came about, and every candidate that was tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.keys import semantic
from lmdistill.search.finalists import Finalist
from lmdistill.search.front import front, hypervolume, reference_of
from lmdistill.search.scored import plan_of
from lmdistill.search.space import Space
from lmdistill.search.sub_space import SubSpace

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import StageContext
    from lmdistill.search.config import SearchConfig
    from lmdistill.search.costs import ModelledDevice
    from lmdistill.search.make_supernet import Making
    from lmdistill.search.run import Tried, World
    from lmdistill.search.shortlist import Shortlist
    from lmdistill.students.regression import Fit

FILE = "search.json"
FORMAT_VERSION = 1
_CUT = {"hidden_sizes": "hidden_size", "intermediate_sizes": "intermediate_size", "kv_heads": "kv_heads"}


def making(config: SearchConfig, space: Space, subs: Sequence[SubSpace]) -> Making:
    """How the super-network is made, for all that the sub-spaces ask for."""
    from lmdistill.search.make_supernet import Making

    shapes = [shape for sub in subs for shape in sub.shapes]
    narrows = any(getattr(shape, name) < space.teacher_size(key) for shape in shapes for key, name in _CUT.items())
    keys = config.supernet
    return Making(
        hybrid=space.keys.hybrid,
        kernel=max(shape.kernel for shape in shapes),
        narrows=narrows,
        importance_rows=keys.importance_rows,
        fit_rows=keys.fit_rows,
        fit=fit_of(config, keys.fit_steps),
    )


def fit_of(config: SearchConfig, steps: int) -> Fit:
    """How blocks are fitted in so many steps."""
    from lmdistill.students.regression import Fit

    keys = config.supernet
    return Fit(steps, keys.fit_batch_rows, keys.fit_lr, config.precision, config.seed)


def identity(ctx: StageContext[SearchConfig], sub: SubSpace) -> str:
    """What the trainings of a sub-space belong to; another device's profile by its content, wherever it lies."""
    from lmdistill import assets

    inputs = {role: [one.fingerprint for one in given] for role, given in ctx.inputs.items()}
    return json.dumps(
        [semantic(ctx.config, assets.identity), inputs, ctx.need_teacher().digest, sub.name], sort_keys=True
    )


def write(
    ctx: StageContext[SearchConfig],
    tried: Sequence[Tried],
    finalists: Sequence[Finalist],
    world: World,
    timed: Shortlist,
) -> dict[str, Any]:
    """The winner's model, student.json and search.json; returns the metrics."""
    from lmdistill.checkpoints import load_model, save_model

    winner, config = finalists[0], ctx.config
    source = {"inherited": winner.start, "fitted": winner.bridged, "tuned": winner.newest}[config.weights]
    model = world.net.restored(load_model(source), winner.scored.candidate)
    save_model(model, ctx.out / "model", tokenizer_from=world.tokenizer)
    if config.supernet.keep:
        _keep(tried, ctx.out)
    candidate = winner.scored.candidate
    counts = {
        "parameters": _parameters(source),
        "parameters_by_formula": candidate.parameters,
        "layer_types": candidate.shape_config()["layer_types"],
    }
    student = {"init": "search", **counts, "plan": plan_of(candidate, tried[0].sub.space.blocks)}
    (ctx.out / "student.json").write_text(json.dumps({**student, "candidate": candidate.to_json()}, indent=1) + "\n")
    write_json(ctx.out / FILE, _search(config, tried, finalists, world.costs, timed))
    return {**counts, "tried": sum(len(each.scored) for each in tried), "winner": candidate.digest}


def supernet_file(out: Path, sub_space: str) -> Path:
    """Where a sub-space's trained weights are kept in an artefact."""
    return out / f"supernet-{sub_space}.safetensors"


def _keep(tried: Sequence[Tried], out: Path) -> None:
    for each in tried:
        if each.found.state is not None:
            shutil.copyfile(each.found.state, supernet_file(out, each.sub.name))


def _parameters(folder: Path) -> int:
    import math

    from lmdistill.checkpoints import stored_tensors

    return sum(math.prod(shape) for _, shape in stored_tensors(folder))


def _search(
    config: SearchConfig,
    tried: Sequence[Tried],
    finalists: Sequence[Finalist],
    costs: ModelledDevice,
    timed: Shortlist,
) -> dict[str, Any]:
    """search.json: what was asked, what was tried, who came to the end and who won."""
    objectives, everyone = config.objectives, [one for each in tried for one in each.scored]
    reference_M = reference_of(everyone, objectives)
    return {
        "version": FORMAT_VERSION,
        "method": config.method,
        "objectives": ["kd", *objectives],
        "budgets": list(config.budgets),
        "teacher": costs.teacher,
        "reference": reference_M.tolist(),
        "sub_spaces": [_of_sub_space(each, objectives, reference_M) for each in tried],
        "candidates": [
            {"sub_space": each.sub.name, "generation": number, **one.to_json()}
            for each in tried
            for number, generation in enumerate(each.found.generations)
            for one in generation
        ],
        "front": [one.candidate.digest for one in front(everyone, objectives)],
        "finalists": [_of_finalist(one, timed) for one in finalists],
        "timed": {shape: {"measured": timed.timed[shape], "excess": timed.excess[shape]} for shape in timed.timed},
        "winner": finalists[0].scored.candidate.digest,
    }


def _of_sub_space(tried: Tried, objectives: Sequence[str], reference_M: Any) -> dict[str, Any]:
    return {
        "name": tried.sub.name,
        "shapes": len(tried.sub.shapes),
        "curve": tried.found.curve,
        "hypervolume": _history(tried, objectives, reference_M),
    }


def _of_finalist(finalist: Finalist, timed: Shortlist) -> dict[str, Any]:
    candidate = finalist.scored.candidate
    return {
        "digest": candidate.digest,
        "fitted": finalist.fitted,
        "rounds": finalist.rounds,
        "measured": timed.of(candidate),
    }


def _history(tried: Tried, objectives: Sequence[str], reference_M: Any) -> list[float]:
    """The hypervolume of all that was tried up to each generation."""
    found, seen = [], []
    for generation in tried.found.generations:
        seen += [one.values(objectives) for one in generation if one.feasible]
        found.append(round(hypervolume(np.array(seen).reshape(len(seen), -1), reference_M), 6) if seen else 0.0)
    return found
