"""The command `lmdistill`. Nothing heavy is imported before a command needs it: `--help` must be quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lmdistill.cli_cache import cache_app
from lmdistill.cli_profile import profile_device
from lmdistill.cli_recommend import recommend

if TYPE_CHECKING:
    from rich.console import Console

    from lmdistill.pipeline.plan import Plan

app = typer.Typer(
    help="From a teacher LLM to a student that runs fast on a laptop's CPU: one recipe, one command.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
app.command()(recommend)
app.command()(profile_device)


def _version(show: bool) -> None:
    if show:
        from lmdistill import __version__

        typer.echo(f"lmdistill {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def pipeline(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of one that comes with lmdistill.")],
    run_dir: Annotated[Path | None, typer.Option(help="The run folder; default: runs/<recipe name>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with estimates; run nothing.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each stage would run; run nothing.")] = False,
    first: Annotated[str | None, typer.Option("--from", help="Run from this stage on.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Run up to this stage, and with it.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Run this stage alone.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="Make this stage again although it is there.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: stages.distill.lr=5e-4 (repeatable).")
    ] = None,
) -> None:
    """Run a recipe; what is there already is kept.

    Examples: lmdistill pipeline recipes/lfm_small.yaml --dry-run;
    lmdistill pipeline lfm_small --set stages.distill.lr=5e-4 --until distill
    """
    from lmdistill.pipeline.plan import Selection, make_plan
    from lmdistill.pipeline.show import default_run_dir
    from lmdistill.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    selection = Selection(first, last, only, tuple(force or ()))
    plan = make_plan(loaded, run_dir or default_run_dir(loaded.name), selection)
    if dry_run or explain:
        _look(plan, dry_run, explain)
    else:
        _run(plan)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def _look(plan: Plan, dry: bool, why: bool) -> None:
    console = _console()
    if why:
        from lmdistill.pipeline.explain import explain

        for line in explain(plan):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if dry:
        from lmdistill.pipeline.plan import raise_all
        from lmdistill.pipeline.show import dry_run

        raise_all(dry_run(plan, console).problems)


def _run(plan: Plan) -> None:
    from lmdistill.pipeline.display import make_display
    from lmdistill.pipeline.run import run_pipeline

    display = make_display(_console())
    try:
        artefacts = run_pipeline(plan, [display])
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from where it stopped", 130)
    count = sum(step.name in artefacts for step in plan.steps)
    display.say(f"{count} of {len(plan.steps)} results are in {plan.store.root}")
    report = plan.store.root / "report.html"
    if report.is_file() and any(artefact.kind == "report" for artefact in artefacts.values()):
        display.say(f"report: {report}")


@app.command()
def recipes() -> None:
    """List the recipes that come with lmdistill."""
    from lmdistill.recipe import shipped_recipes

    for name, file in shipped_recipes().items():
        first = next(iter(file.read_text(encoding="utf-8").splitlines()), "")
        typer.echo(f"{name:<16} {first.removeprefix('#').strip() if first.startswith('#') else file}")


@app.command()
def stages(
    name: Annotated[str | None, typer.Argument(help="Show this stage's keys.")] = None,
) -> None:
    """List the stages, or the keys of one: type, default, meaning."""
    from lmdistill.errors import LmdistillError, nearest
    from lmdistill.stages import load_stage, stage_files

    known = stage_files()
    if name is None:
        for each in known:
            stage = load_stage(each)
            taken = ", ".join(f"{role.role}{'…' if role.many else ''}" for role in stage.inputs) or "nothing"
            typer.echo(f"{each:<12} {taken} → {stage.output}: {_summary(stage)}")
        return
    if name not in known:
        raise LmdistillError(f"there is no stage '{name}'{nearest(name, known)}", fix=f"stages: {', '.join(known)}")
    _print_keys(name)


def _summary(stage: Any) -> str:
    return next(iter((stage.__doc__ or "").strip().splitlines()), "")


def _print_keys(name: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lmdistill.recipe.describe import keys_of
    from lmdistill.stages import load_stage

    stage = load_stage(name)
    typer.echo(f"{name}: {_summary(stage)}")
    for role in stage.inputs:
        extent = "each earlier" if role.many else "an optional" if role.optional else "a"
        typer.echo(f"  takes {extent} {' or '.join(role.kinds)} ({role.role})")
    typer.echo(f"  makes a {stage.output}")
    table = Table("key", "type", "default", "meaning", box=box.SIMPLE_HEAD)
    for key in keys_of(stage.Config):
        meaning = f"{key.description} (runtime)" if key.runtime else key.description
        table.add_row(*(Text(cell) for cell in (key.path, key.type, key.default, meaning)))
    _console().print(table)
    for choice, names in stage.choices().items():
        typer.echo(f"{choice}: one of")
        for each, meaning in names.items():
            typer.echo(f"  {each:<18} {meaning}")


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Entry point: user errors become one message and exit status 2."""
    from lmdistill.errors import LmdistillError

    try:
        app()
    except LmdistillError as error:
        if os.environ.get("LMDISTILL_TRACEBACK"):
            raise
        logs = [f"  log: {note}" for note in getattr(error, "__notes__", [])]
        _fail("\n".join([f"error: {error.render()}", *logs]), error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        if os.environ.get("LMDISTILL_TRACEBACK"):
            raise
        _fail(f"error: {error}\n  do:  set that right; the same command goes on from where it stopped", 2)
