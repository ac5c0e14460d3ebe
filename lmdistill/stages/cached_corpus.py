"""cached_corpus: the rows of a teacher cache from elsewhere (imported, merged, of another run) as this run's corpus."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import Estimate, PreflightContext, Stage, StageConfig, StageContext

BYTES = 8  # of a token on disk, at most


class CachedCorpusConfig(StageConfig):
    """Which cache, and whose tokens it holds."""

    cache: AssetSpec = Field(description="folder of a teacher cache, as `lmdistill cache import|merge|convert` writes")
    tokenizer: AssetSpec | None = Field(
        default=None, description="the tokenizer of its tokens; null: the one in the cache's folder (imports have it)"
    )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the cache has; none where there is no cache."""
        from lmdistill.signals.exchange.as_corpus import open_cache

        try:
            return tuple(open_cache(self.cache).manifest.splits)
        except LmdistillError:  # said by this stage's own preflight
            return ()


class CachedCorpusStage(Stage[CachedCorpusConfig]):
    """A teacher cache's rows as a corpus; `cached_signals` brings its predictions."""

    name = "cached_corpus"
    version = 1
    Config = CachedCorpusConfig
    output = "corpus"

    def preflight(self, ctx: PreflightContext[CachedCorpusConfig]) -> list[LmdistillError]:
        """The cache is whole at first sight, and the tokenizer is its own."""
        from lmdistill.assets import available
        from lmdistill.signals.exchange.as_corpus import check_tokenizer, open_cache, tokenizer_beside

        try:
            cache = open_cache(ctx.config.cache)
            named = None if ctx.config.tokenizer is None else available(ctx.config.tokenizer)
            if ctx.config.tokenizer is None or (named is not None and named.is_dir()):
                check_tokenizer(cache, named or tokenizer_beside(cache))
        except LmdistillError as error:
            return [error]
        return []

    def estimate(self, ctx: PreflightContext[CachedCorpusConfig]) -> Estimate:
        """From the rows that the manifest counts."""
        from lmdistill.signals.exchange.as_corpus import open_cache

        cache = open_cache(ctx.config.cache)
        rows = sum(split.rows for split in cache.manifest.splits.values())
        return Estimate(disk_bytes=BYTES * rows * cache.layout.row_tokens)

    def run(self, ctx: StageContext[CachedCorpusConfig]) -> dict[str, Any]:
        """Write the corpus."""
        from lmdistill.assets import tokenizer_folder
        from lmdistill.signals.exchange.as_corpus import corpus_from_cache, open_cache, tokenizer_beside

        cache, named = open_cache(ctx.config.cache), ctx.config.tokenizer
        folder = tokenizer_beside(cache) if named is None else tokenizer_folder(named, ctx.progress)
        return corpus_from_cache(cache, folder, ctx.out)

    def verify(self, ctx: StageContext[CachedCorpusConfig], metrics: dict[str, Any]) -> None:
        """What lies on disk is what was counted."""
        from lmdistill.corpus.format import CorpusReader

        CorpusReader(ctx.out).verify()
