"""The plan as people read it: `--dry-run`'s table, the teacher, what would be fetched, what is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lmdistill.pipeline.display import duration, size
from lmdistill.pipeline.plan import Plan, Step
from lmdistill.pipeline.preflight import Findings, run_preflights
from lmdistill.pipeline.stage import Estimate

if TYPE_CHECKING:
    from rich.console import Console


def dry_run(plan: Plan, console: Console) -> Findings:
    """Print the plan with estimates; nothing is downloaded, written or run. Returns what the preflights found."""
    from lmdistill import assets

    teacher = plan.recipe.teacher
    reference = assets.model_available(teacher) if teacher else None
    found = run_preflights(plan, reference) if plan.running() else Findings()
    _print_table(plan, found, console)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if teacher is not None and plan.teacher is not None:
        say(f"teacher: {teacher.source}{'' if reference else ' (not on this machine yet)'}")
        say(f"  identity: {plan.teacher.fingerprint}")
    missing = [spec.source for spec in plan.model_assets() if assets.model_available(spec) is None]
    missing += [spec.source for spec in plan.data_assets() if assets.available(spec) is None]
    for source in missing:
        say(f"would fetch: {source}")
    say("remote code: never run; pickle: never read")
    say(f"run folder: {plan.store.root}")
    return found


def _print_table(plan: Plan, found: Findings, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{plan.recipe.name}: {len(plan.running())} of {len(plan.steps)} to run")
    for column in ("#", "stage", "fingerprint", "state", "time", "disk", "memory"):
        table.add_column(column, no_wrap=True)
    table.add_column("note", overflow="fold")
    for step in plan.steps:
        table.add_row(*_row(step, found.estimates.get(step.name, Estimate())))
    console.print(table)
    running = plan.running()
    seconds = [found.estimates.get(step.name, Estimate()).seconds for step in running]
    known = [value for value in seconds if value is not None]
    if running and len(known) == len(running):
        console.print(f"about {duration(sum(known))}", highlight=False)
    elif running:  # a sum of the small ones would read as the whole
        unknown = len(running) - len(known)
        console.print(f"time is not known yet of {unknown} of {len(running)} stages", highlight=False)


def _row(step: Step, estimate: Estimate) -> list[str]:
    state = "run (forced)" if step.runs and step.planned.artefact else step.state
    name = step.name if step.name == step.entry.stage.name else f"{step.name} ({step.entry.stage.name})"
    costs = ["", "", ""]
    if step.runs:
        costs = [duration(estimate.seconds), size(estimate.disk_bytes), size(estimate.memory_bytes)]
    return [str(step.number), name, step.short, state, *costs, estimate.note]


def default_run_dir(name: str) -> Path:
    """runs/<recipe name> in the current directory."""
    return Path("runs") / name
