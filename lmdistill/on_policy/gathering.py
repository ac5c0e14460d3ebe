"""The prompts that a run of `on_policy` sees, from its own records or its corpus."""

from __future__ import annotations

from pathlib import Path

from lmdistill.corpus.format import CorpusReader
from lmdistill.corpus.tokenizers import tokenizer_digest
from lmdistill.errors import IntegrityError
from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.on_policy.prompts import Prompt, of_corpus, of_records, read
from lmdistill.pipeline.stage import StageContext


def gather(ctx: StageContext[OnPolicyConfig], student: Path, split: str) -> list[Prompt]:
    """As many prompts as the steps take, in their order, as the tokens of the student in the folder `student`.

    Raises IntegrityError where the corpus has other tokens, PreflightError where there is no prompt.
    """
    config = ctx.config
    count, longest = config.steps * config.batch_prompts, config.max_prompt_tokens
    if config.prompts is not None:
        from lmdistill import assets
        from lmdistill.checkpoints import load_tokenizer

        path = assets.fetch(config.prompts, ctx.progress)
        records = read(config.prompts, path, load_tokenizer(student), ctx.work)
        return of_records(records, count, longest, config.seed, config.prompts.source)
    corpus = CorpusReader(ctx.one("corpus").out)
    if tokenizer_digest(student) != corpus.meta.tokenizer_digest:
        raise IntegrityError(
            f"the corpus {corpus.folder} was made with another tokenizer than the student in {student}",
            fix="run corpus again with the tokenizer that the student has",
        )
    return of_corpus(corpus.split(split), count, longest, config.prompt_tokens, config.seed)
