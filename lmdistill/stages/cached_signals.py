"""cached_signals: the predictions of a teacher cache from elsewhere (imported, merged, of another run), proven."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import IntegrityError, LmdistillError, PreflightError
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, Stage, StageConfig, StageContext

if TYPE_CHECKING:
    from lmdistill.signals.format import Layout

TRAINED = "train"  # the split that distill reads


class CachedSignalsConfig(StageConfig):
    """Which cache."""

    cache: AssetSpec = Field(description="folder of a teacher cache, as `lmdistill cache import|merge|convert` writes")

    @property
    def variant(self) -> str:
        """How the cache is stored, as `teach`'s key of this name: losses go by it. Empty where there is no cache."""
        layout = self._layout()
        return "" if layout is None else layout.variant

    @property
    def hidden_layers(self) -> tuple[int, ...] | None:
        """Whose hidden states it holds, as `teach`'s key of this name. None where there is no cache."""
        layout = self._layout()
        return None if layout is None else () if layout.hidden is None else layout.hidden.layers

    def _layout(self) -> Layout | None:
        from lmdistill.signals.exchange.as_corpus import open_cache

        try:
            return open_cache(self.cache).layout
        except LmdistillError:  # said by this stage's own preflight
            return None


class CachedSignalsStage(Stage[CachedSignalsConfig]):
    """A finished teacher cache in place of `teach`; its rows must be those of the corpus."""

    name = "cached_signals"
    version = 1
    Config = CachedSignalsConfig
    inputs = (Input("corpus", ("corpus",)),)
    output = "signals"

    def preflight(self, ctx: PreflightContext[CachedSignalsConfig]) -> list[LmdistillError]:
        """The cache is whole at first sight, has what training reads, and holds the rows of a corpus that is here."""
        from lmdistill.signals.exchange.as_corpus import open_cache

        try:
            cache, corpus = open_cache(ctx.config.cache), ctx.one("corpus")
            if TRAINED not in cache.manifest.splits:
                raise PreflightError(
                    f"the cache {cache.folder} has no split '{TRAINED}'",
                    why=f"it has {', '.join(cache.manifest.splits)}",
                    fix="name another `cache`",
                )
            if corpus.artefact is not None:
                meta = json.loads((corpus.artefact.out / "corpus.json").read_text())
                check_rows({name: split["digest"] for name, split in meta["splits"].items()}, cache.manifest)
        except LmdistillError as error:
            return [error]
        return []

    def estimate(self, ctx: PreflightContext[CachedSignalsConfig]) -> Estimate:
        """The bytes of shards and of hidden states beside them, where they cannot be linked."""
        from lmdistill.signals.exchange.as_corpus import open_cache

        manifest = open_cache(ctx.config.cache).manifest
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        beside = manifest.layout.row_tokens * manifest.layout.beside  # bytes a row
        return Estimate(disk_bytes=sum(shard.bytes + shard.rows * beside for shard in shards))

    def run(self, ctx: StageContext[CachedSignalsConfig]) -> dict[str, Any]:
        """Take the cache's files; every byte is checked."""
        from lmdistill.corpus.format import CorpusReader
        from lmdistill.signals.exchange.as_corpus import open_cache, take_cache

        cache, corpus = open_cache(ctx.config.cache), CorpusReader(ctx.one("corpus").out)
        check_rows({name: split.digest for name, split in corpus.meta.splits.items()}, cache.manifest)
        take_cache(cache, ctx.out)
        statistics = {name: split.statistics for name, split in cache.manifest.splits.items()}
        first = statistics[TRAINED]
        return {
            "k": cache.layout.k,
            **{name: first[name] for name in ("bytes_per_token", "head_mass", "teacher_nll")},
            "tokens": sum(int(figures["tokens"] or 0) for figures in statistics.values()),
            "splits": statistics,
            "digest": cache.manifest.digest,
        }

    def verify(self, ctx: StageContext[CachedSignalsConfig], metrics: dict[str, Any]) -> None:
        """Read everything again: bytes and alignment."""
        from lmdistill.signals.inspect import verify

        problems = verify(ctx.out)
        if problems:
            raise IntegrityError(
                f"the teacher cache is not what was written: {len(problems)} problems",
                why="\n       ".join(problems[:4]),
                fix="make the cache that `cache` names anew",
            )


def check_rows(corpus: dict[str, str], manifest: Any) -> None:
    """Raise PreflightError where the cache holds other rows than the corpus, split by split, by their digests."""
    for name, split in manifest.splits.items():
        if corpus.get(name) != split.corpus_digest:
            raise PreflightError(
                f"the cache's rows of split '{name}' are not the corpus'",
                why=f"digests {split.corpus_digest[:12]} (cache) and {(corpus.get(name) or 'none')[:12]} (corpus)",
                fix="put `cached_corpus` with the same `cache` before this stage",
            )
