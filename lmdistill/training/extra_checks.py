"""What a distillation needs beyond the training packages: known optimisers, and the packages they and adapters need."""

from __future__ import annotations

import importlib.util

from lmdistill.errors import LmdistillError, PreflightError, nearest
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.training.config import DistillConfig
from lmdistill.training.optimizers import kinds


def extra_packages(config: DistillConfig) -> dict[str, str]:
    """Distribution → lmdistill's extra that brings it, for what this configuration asks for."""
    packages = {"peft": "lora"} if config.lora else {}
    chosen = kinds().get(config.optimizer)
    return packages | ({chosen.extra: chosen.extra} if chosen and chosen.extra else {})


def check_extras(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """An unknown optimiser with the nearest name; each package that is asked for and missing, with its extra."""
    known, chosen = kinds(), ctx.config.optimizer
    problems: list[LmdistillError] = []
    if chosen not in known:
        what = f"stage '{ctx.name}': no optimizer is called '{chosen}'{nearest(chosen, known)}"
        problems.append(PreflightError(what, fix=f"one of: {', '.join(known)}"))
    for package, extra in extra_packages(ctx.config).items():
        if importlib.util.find_spec(package) is None:
            key = "lora" if extra == "lora" else f"optimizer: {chosen}"
            what = f"stage '{ctx.name}': `{key}` needs the package {package}"
            problems.append(PreflightError(what, why="not installed", fix=f"pip install 'lmdistill[{extra}]'"))
    return problems
