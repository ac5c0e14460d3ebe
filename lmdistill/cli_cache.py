"""`lmdistill cache …`: look into teacher caches, check, convert, merge and import them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmdistill.pipeline.stage import Progress
    from lmdistill.signals.format import Manifest

cache_app = typer.Typer(help="Look into teacher caches; check, convert, merge and import them.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(help="A signals artefact, or its out folder.")]
Out = Annotated[Path, typer.Argument(help="The folder to make; it must not be there.")]


@cache_app.command("info")
def cache_info(folder: Folder) -> None:
    """Describe a teacher cache: teacher, tokens, K, bytes a token, head mass."""
    from lmdistill.signals import inspect

    for key, value in inspect.describe(_out(folder)).items():
        typer.echo(f"{key}: {value}")


@cache_app.command("verify")
def cache_verify(folder: Folder) -> None:
    """Check every shard's digest, and that the cached log-probs belong to the cached tokens."""
    from lmdistill.errors import IntegrityError
    from lmdistill.signals import inspect

    with _bar("checking") as advance:
        problems = inspect.verify(_out(folder), advance)
    if problems:
        raise IntegrityError("\n".join(problems), fix="run the recipe's teach stage again")
    typer.echo("every shard is what was written, and belongs to its tokens")


@cache_app.command("convert")
def cache_convert(
    folder: Folder,
    out: Out,
    variant: Annotated[str | None, typer.Option(help="mmap: fastest; compact: smallest. Default: as it is.")] = None,
    k: Annotated[int | None, typer.Option(help="Keep the k most likely entries of a token. Default: all.")] = None,
) -> None:
    """Write a cache in another variant, or with fewer entries, without the teacher; nothing else changes.

    Killed, the same command goes on. Example: lmdistill cache convert runs/a/02-teach-* small --variant compact --k 16
    """
    from lmdistill.signals.exchange.convert import convert

    with _progress("converting") as progress:
        manifest = convert(folder, out, variant, k, progress)
    typer.echo(_size(out, manifest))


@cache_app.command("merge")
def cache_merge(
    out: Out,
    folders: Annotated[list[Path], typer.Argument(help="The caches, in the order their rows are to have.")],
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Keep each row once; a row of valid is kept there.")
    ] = False,
) -> None:
    """Join caches of one teacher, tokenizer and layout; splits are joined by name.

    Killed, the same command goes on. Example: lmdistill cache merge all runs/a/02-teach-* runs/b/02-teach-*
    """
    from lmdistill.signals.exchange.merge import merge

    with _progress("merging") as progress:
        merged = merge(out, folders, deduplicate, progress)
    typer.echo(_size(out, merged.manifest))
    kept = f"{merged.dropped} left out" if deduplicate else "all kept; --deduplicate leaves them out"
    if merged.duplicates or merged.leaked:
        typer.echo(f"{merged.duplicates} rows come again in their split, {merged.leaked} are held out in valid: {kept}")


@cache_app.command("import")
def cache_import(
    source: Annotated[Path, typer.Argument(help="Parquet, Arrow or JSON lines: a file, or a folder of them.")],
    out: Out,
    format: Annotated[str, typer.Option("--format", help="distillkit or axolotl.")],
    tokenizer: Annotated[str, typer.Option(help="The teacher's tokenizer: a folder, or a source such as hf:….")],
    teacher: Annotated[str, typer.Option(help="Who spoke; caches of one teacher can be merged.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="DistillKit's settings of the capture. Default: those beside the data.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Keep the k most likely entries. Default: all there are.")] = None,
    row_tokens: Annotated[int | None, typer.Option(help="Tokens in a row. Default: the longest document.")] = None,
    variant: Annotated[str, typer.Option(help="mmap: fastest; compact: smallest.")] = "mmap",
    valid_fraction: Annotated[float, typer.Option(help="Share of documents for the split valid.")] = 0.0,
    alignment: Annotated[
        str, typer.Option(help="next: row j predicts token j+1; same: it is of token j (older axolotl).")
    ] = "next",
    temperature: Annotated[float, typer.Option(help="Of the source's log-probs; undone where that is exact.")] = 1.0,
    renormalize: Annotated[
        bool, typer.Option("--renormalize", help="Take the entries for all there is: for logits.")
    ] = False,
    logprobs_field: Annotated[str, typer.Option(help="axolotl: the field with log-probs.")] = "logprobs",
    messages_field: Annotated[str, typer.Option(help="axolotl: the field with the conversation.")] = "messages",
    drop_unmatched: Annotated[
        bool, typer.Option("--drop-unmatched", help="axolotl: leave out conversations that do not fit their log-probs.")
    ] = False,
) -> None:
    """Make a cache of log-probs that another program captured; a recipe reads it with cached_corpus and cached_signals.

    Killed, the same command goes on.
    Example: lmdistill cache import logits/ imported --format distillkit --tokenizer hf:Qwen/Qwen3-8B@main
    """
    from lmdistill.asset_spec import AssetSpec
    from lmdistill.assets import tokenizer_folder
    from lmdistill.pipeline.stage import SilentProgress
    from lmdistill.signals.exchange.importing import ImportOptions, import_cache

    folder = tokenizer_folder(AssetSpec(source=tokenizer), SilentProgress())
    options = ImportOptions(
        format=format,
        tokenizer=folder,
        teacher=teacher,
        config=config,
        k=k,
        row_tokens=row_tokens,
        variant=variant,
        valid_fraction=valid_fraction,
        alignment=alignment,
        temperature=temperature,
        renormalize=renormalize,
        logprobs_field=logprobs_field,
        messages_field=messages_field,
        drop_unmatched=drop_unmatched,
    )
    with _progress("importing") as progress:
        imported = import_cache(source, out, options, progress)
    typer.echo(_size(out, imported.manifest))
    for line in imported.notes():
        typer.echo(line)


def _out(folder: Path) -> Path:
    return folder / "out" if (folder / "out").is_dir() else folder


def _size(out: Path, manifest: Manifest) -> str:
    parts = [f"{name} {split.rows:,} rows" for name, split in manifest.splits.items()]
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    return f"{out}: {', '.join(parts)}, K = {manifest.layout.k}, {manifest.layout.variant}, {size / 1e6:,.1f} MB"


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float, float], None]]:
    """A bar on the terminal while something long is done; takes done and total."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """The same as a stage's progress."""
    from lmdistill.pipeline.stage import SilentProgress

    with _bar(what) as advance:

        class Shown(SilentProgress):
            def update(self, done: float, total: float, unit: str = "", **figures: float | str) -> None:
                advance(done, total)

        yield Shown()
