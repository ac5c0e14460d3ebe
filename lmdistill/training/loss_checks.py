"""What can be known of a distillation's loss before it runs: it exists, its keys are read, its teacher fits."""

from __future__ import annotations

from lmdistill.errors import LmdistillError, PreflightError, nearest
from lmdistill.losses import registry
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.training.config import DistillConfig


def check_loss(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """An unknown loss with the nearest name and all names; each option that the chosen loss does not read."""
    known, chosen = registry.catalogue(), ctx.config.loss
    if chosen not in known:
        return [
            PreflightError(
                f"stage '{ctx.name}': no loss is called '{chosen}'{nearest(chosen, known)}",
                fix=f"one of: {', '.join(known)}",
            )
        ]
    return [
        PreflightError(
            f"stage '{ctx.name}': the loss '{chosen}' does not read `{option}`",
            why=f"it reads {', '.join(known[chosen].options) or 'no option'}",
            fix=f"drop `{option}`, or choose a loss that reads it: "
            + ", ".join(name for name, one in known.items() if option in one.options),
        )
        for option in registry.unread_options(chosen, ctx.config.options())
    ]


def check_live_teacher(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """A live teacher has the tokens that the rows are made of, as far as both are on this machine."""
    from lmdistill.corpus.tokenizers import planned_tokenizer
    from lmdistill.teachers.token_maps import check_same_tokens, token_map

    corpus = ctx.ancestor("corpus")
    if not ctx.config.runs_teacher or ctx.teacher is None or corpus is None:
        return []
    try:
        folder = planned_tokenizer(corpus, ctx.teacher)
        if folder not in (None, ctx.teacher.path):
            check_same_tokens(token_map(folder), token_map(ctx.teacher.path), "the corpus' tokenizer", "the teacher's")
    except LmdistillError as error:
        return [error]
    return []
