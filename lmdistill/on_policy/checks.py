"""What can be known of on-policy distillation before it runs: loss, sampler, lengths, tokens, prompts, packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.on_policy import samplers
from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.pipeline.stage import PreflightContext

Context = PreflightContext[OnPolicyConfig]


def problems(ctx: Context) -> list[LmdistillError]:
    """Everything that is wrong, one error each."""
    found: list[LmdistillError] = []
    for check in CHECKS:
        try:
            check(ctx)
        except LmdistillError as error:
            found.append(error)
    return found


def _loss(ctx: Context) -> None:
    from lmdistill.losses import registry

    learns_from, usable = registry.signals_of(ctx.config.loss), ("live", "top_k")
    if learns_from not in usable:
        names = [name for name, one in registry.catalogue().items() if one.signals in usable]
        raise PreflightError(
            f"stage '{ctx.name}': the loss '{ctx.config.loss}' does not compare with what a live teacher says",
            fix=f"one of: {', '.join(names)}",
        )
    unread = registry.unread_options(ctx.config.loss, ctx.config.options())
    if unread:
        raise PreflightError(
            f"stage '{ctx.name}': the loss '{ctx.config.loss}' does not read `{'`, `'.join(unread)}`",
            fix=f"drop `{'`, `'.join(unread)}`, or choose a loss that reads it",
        )


def _sampler(ctx: Context) -> None:
    if importlib.util.find_spec("trl") is None:
        raise PreflightError(f"stage '{ctx.name}' needs trl", fix="pip install 'lmdistill[trl]'")
    from lmdistill.quantization.planned import lies_on

    on_grid = any(lies_on(student) is not None for student in ctx.inputs.get("student", ()))
    samplers.choose(ctx.config.sampler, ctx.runtime.resolve_device(), on_grid)


def _packed(ctx: Context) -> None:
    """A student of packed integers cannot learn."""
    from lmdistill.checkpoints import refuse_packed
    from lmdistill.quantization.planned import folder_ahead

    for student in ctx.inputs.get("student", ()):
        if (folder := folder_ahead(student)) is not None:
            refuse_packed(folder, fix="give the checkpoint in full precision")


def _lengths(ctx: Context) -> None:
    from lmdistill.corpus.build import model_maximum

    longest = ctx.config.max_prompt_tokens + ctx.config.max_new_tokens
    maximum = None if ctx.teacher is None else model_maximum(ctx.teacher.path)
    if maximum is not None and longest > maximum:
        raise PreflightError(
            f"stage '{ctx.name}': prompts of up to {ctx.config.max_prompt_tokens} tokens with "
            f"{ctx.config.max_new_tokens} new ones are above the teacher's maximum of {maximum}",
            fix="lower `max_prompt_tokens` or `max_new_tokens`",
        )


def _corpus_rows(ctx: Context) -> None:
    """A document's prompt leaves room in a row for a completion to learn from."""
    for corpus in () if ctx.config.prompts else ctx.inputs.get("corpus", ()):
        length = getattr(corpus.config, "sequence_length", None)
        chat = any(source.messages for source in getattr(corpus.config, "sources", ()))
        if length is not None and not chat and ctx.config.prompt_tokens >= length:
            raise PreflightError(
                f"stage '{ctx.name}': prompt_tokens {ctx.config.prompt_tokens} takes all of a row of {length} tokens",
                fix="lower `prompt_tokens`",
            )


def _tokens(ctx: Context) -> None:
    """The teacher's tokens are the corpus', and its tokenizer says where a completion ends."""
    from lmdistill.corpus import tokenizers
    from lmdistill.teachers.token_maps import check_same_tokens, token_map

    if ctx.teacher is None:
        return
    for corpus in ctx.inputs.get("corpus", ()):
        folder = tokenizers.planned_tokenizer(corpus, ctx.teacher)
        if folder not in (None, ctx.teacher.path):
            check_same_tokens(token_map(folder), token_map(ctx.teacher.path), "the corpus' tokenizer", "the teacher's")
    if not tokenizers.declares(ctx.teacher.path, "eos"):
        raise PreflightError(
            f"stage '{ctx.name}': the teacher's tokenizer has no end-of-sequence token, where completions stop",
            fix="name it as `eos_token` in the teacher's tokenizer_config.json",
        )


def _records(ctx: Context) -> None:
    """The records are there, with the field that is named, and a chat template where they are conversations."""
    from lmdistill import assets
    from lmdistill.corpus.load import check_fields, first_fields
    from lmdistill.corpus.tokenizers import chat_template

    source = ctx.config.prompts
    if source is None:
        return
    path = assets.available(source)
    fields = None if path is None else first_fields(source, path)
    if fields is not None:
        check_fields(source, fields)
    if source.messages and ctx.teacher is not None and chat_template(ctx.teacher.path) is None:
        raise PreflightError(
            f"{source.source} holds conversations, and the teacher's tokenizer has no chat template",
            fix="use a teacher with a chat template, or `text:` instead of `messages:`",
        )


CHECKS: tuple[Callable[[Context], None], ...] = (_loss, _sampler, _packed, _lengths, _corpus_rows, _tokens, _records)
