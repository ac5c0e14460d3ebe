"""Stage `corpus`: data files and data sets become rows of tokens that say themselves what counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.corpus.config import CorpusConfig, Source
from lmdistill.errors import IntegrityError, LmdistillError, PreflightError
from lmdistill.pipeline.stage import Estimate, PreflightContext, Stage, StageContext

if TYPE_CHECKING:
    from lmdistill.corpus.format import CorpusSplit

BYTES_PER_SECOND = 1_000_000  # text loaded, encoded and packed by one process of a laptop
VERIFY_ROWS = 4096  # rows at a time, so that memory does not grow with the corpus
DISK_PER_BYTE = 5  # of text: the records, the encoded documents, the rows


class CorpusStage(Stage[CorpusConfig]):
    """Load, render, tokenise, deduplicate, split, shuffle and pack."""

    name = "corpus"
    version = 1
    Config = CorpusConfig
    output = "corpus"
    tools = ("tokenizers", "transformers", "datasets", "jinja2")

    def uses_teacher(self, config: CorpusConfig) -> bool:
        """The teacher's tokenizer, unless the recipe names another."""
        return config.tokenizer is None

    def preflight(self, ctx: PreflightContext[CorpusConfig]) -> list[LmdistillError]:
        """Sources are there with the fields named; the tokenizer has what is asked of it."""
        problems = [problem for source in ctx.config.sources if (problem := _source_problem(source)) is not None]
        try:
            folder = _tokenizer_on_disk(ctx)
            if folder is not None:
                _check_tokenizer(ctx.config, folder)
        except LmdistillError as error:
            problems.append(error)
        return problems

    def estimate(self, ctx: PreflightContext[CorpusConfig]) -> Estimate:
        """Time and disk from the sources' sizes, as far as they are on this machine."""
        from lmdistill import assets

        found = [assets.available(source) for source in ctx.config.sources]
        if any(path is None for path in found):
            return Estimate(note="not all sources are fetched yet")
        total = sum(_size(path) for path in found if path is not None)
        return Estimate(seconds=5 + total / BYTES_PER_SECOND, disk_bytes=DISK_PER_BYTE * total)

    def run(self, ctx: StageContext[CorpusConfig]) -> dict[str, Any]:
        """Build the corpus into `ctx.out`."""
        from lmdistill import assets
        from lmdistill.corpus.build import build

        paths = [assets.fetch(source, ctx.progress) for source in ctx.config.sources]
        chosen = ctx.config.tokenizer
        folder = ctx.need_teacher().path if chosen is None else assets.tokenizer_folder(chosen, ctx.progress)
        return build(ctx.config, paths, folder, ctx.out, ctx.work, ctx.progress, ctx.runtime.workers)

    def verify(self, ctx: StageContext[CorpusConfig], metrics: dict[str, Any]) -> None:
        """What lies on disk is what was counted, every row has a target, and no target is padding."""
        from lmdistill.corpus.format import CorpusReader

        reader = CorpusReader(ctx.out)
        reader.verify()
        for split in reader.splits.values():
            for start in range(0, len(split), VERIFY_ROWS):
                _check_rows(split, slice(start, start + VERIFY_ROWS), reader.meta.vocab_size)


def _check_rows(split: CorpusSplit, rows: slice, vocab_size: int) -> None:
    """Raise IntegrityError where a row has no target, a target that is padding, or an id that no token has."""
    from lmdistill.corpus.format import LOSS, PAD

    flags_RT = split.flags_RT[rows]
    loss_RT, padding_RT = (flags_RT & LOSS) != 0, (flags_RT & PAD) != 0
    if not loss_RT.any(axis=1).all() or loss_RT[:, -1].any() or (loss_RT[:, :-1] & padding_RT[:, 1:]).any():
        raise IntegrityError(f"split '{split.name}' has a row without a target, or a target outside its document")
    if int(split.tokens_RT[rows].max()) >= vocab_size:
        raise IntegrityError(f"split '{split.name}' holds ids above the tokenizer's vocabulary")


def _source_problem(source: Source) -> LmdistillError | None:
    """What is wrong with a source, as far as it is on this machine."""
    from lmdistill import assets
    from lmdistill.corpus.load import check_fields, first_fields

    try:
        path = assets.available(source)
        fields = None if path is None else first_fields(source, path)
        if fields is not None:
            check_fields(source, fields)
    except LmdistillError as error:
        return error
    return None


def _tokenizer_on_disk(ctx: PreflightContext[CorpusConfig]) -> Path | None:
    """The tokenizer's folder where it is known already; PreflightError where the recipe names none."""
    from lmdistill import assets

    if ctx.config.tokenizer is not None:
        path = assets.available(ctx.config.tokenizer)
        return path if path is not None and path.is_dir() else None
    return None if ctx.teacher is None else ctx.teacher.path


def _check_tokenizer(config: CorpusConfig, folder: Path) -> None:
    """The tokenizer has the separator, a template where conversations need one, and room for a row."""
    from lmdistill.checkpoints import load_tokenizer
    from lmdistill.corpus import tokenizers
    from lmdistill.corpus.build import model_maximum

    tokenizers.read_tokenizer_json(folder)
    chats = [source.source for source in config.sources if source.messages is not None]
    if chats and tokenizers.chat_template(folder) is None:
        raise PreflightError(
            f"{chats[0]} holds conversations, and the tokenizer has no chat template",
            fix="use a teacher with a chat template, or `text:` instead of `messages:`",
        )
    maximum = model_maximum(folder)
    if maximum is not None and config.sequence_length > maximum:
        raise PreflightError(
            f"sequence_length {config.sequence_length} is above the model's maximum of {maximum} tokens",
            fix=f"set `sequence_length:` to at most {maximum}",
        )
    if not tokenizers.declares(folder, config.separator):  # transformers, which takes seconds to import, may know more
        tokenizers.separator_id(load_tokenizer(folder), config.separator)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
