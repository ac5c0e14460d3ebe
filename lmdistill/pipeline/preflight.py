"""Everything that can be known before work starts, of all stages that will run, said at once.

Preflights run in a worker process, under the interpreter of their stage: this one stays small, and imports nothing
heavy. Assets are fetched between a first, cheap round (the teacher may not be here yet) and a second, full one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.display import size
from lmdistill.pipeline.jobs import (
    error_from_json,
    estimate_from_json,
    model_to_json,
    planned_to_json,
)
from lmdistill.pipeline.plan import Plan, Step
from lmdistill.pipeline.process import call
from lmdistill.pipeline.stage import Estimate, ModelRef

MARGIN = 1.05  # of the estimated disk space


@dataclass
class Findings:
    """What the preflights found."""

    problems: list[LmdistillError] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)  # by stage name


def run_preflights(plan: Plan, teacher: ModelRef | None, log: Path | None = None) -> Findings:
    """Check and estimate every stage that will run; disk and memory against this machine."""
    found = Findings()
    steps = plan.running()
    for python in dict.fromkeys(step.python for step in steps):
        names = [step.name for step in steps if step.python == python]
        for name, result in _ask(plan, names, teacher, python, log).items():
            found.problems += [error_from_json(error) for error in result["errors"]]
            found.estimates[name] = estimate_from_json(result["estimate"])
    found.problems += check_resources(steps, found.estimates, plan.store.root)
    return found


def _ask(plan: Plan, names: list[str], teacher: ModelRef | None, python: str, log: Path | None) -> dict[str, Any]:
    planned = [*([plan.teacher] if plan.teacher else []), *(step.planned for step in plan.steps)]
    job = {
        "task": "preflight",
        "planned": planned_to_json(planned),
        "stages": names,
        "teacher": model_to_json(teacher),
        "run_dir": str(plan.store.root),
        "runtime": runtime_job(plan),
    }
    result: dict[str, Any] = call(job, "the preflight", python, log, lambda message: None)
    return result


def runtime_job(plan: Plan) -> dict[str, Any]:
    """The runtime section as a job carries it."""
    return plan.recipe.runtime.model_dump(exclude={"python"})


def check_resources(steps: Sequence[Step], estimates: Mapping[str, Estimate], run_dir: Path) -> list[LmdistillError]:
    """Disk for all stages together, memory for each by itself."""
    problems: list[LmdistillError] = []
    wanted = [(step.name, estimates[step.name].disk_bytes or 0) for step in steps if step.name in estimates]
    needed, free = sum(count for _, count in wanted) * MARGIN, free_disk(run_dir)
    if needed > free:
        largest = max(wanted, key=lambda item: item[1])
        problems.append(
            PreflightError(
                f"too little disk: this run needs {size(needed)} and {run_dir} has {size(free)} free",
                why=f"the largest part is {size(largest[1])} for stage '{largest[0]}'",
                fix="free some space, or put the run on another disk with --run-dir",
            )
        )
    total = total_memory()
    for step in steps:
        memory = estimates.get(step.name, Estimate()).memory_bytes or 0
        if memory > total:
            problems.append(
                PreflightError(
                    f"too little memory for stage '{step.name}'",
                    why=f"it needs {size(memory)}, and this machine has {size(total)}",
                    fix="make its batches, model or shards smaller, or run it on a larger machine",
                )
            )
    return problems


def free_disk(folder: Path) -> int:
    """Free bytes of the file system that holds, or will hold, `folder`."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def total_memory() -> int:
    """Bytes of memory that this machine, or the container we are in, has."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
