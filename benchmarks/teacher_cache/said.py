"""What the teacher says of a corpus, computed once and kept exact, and its caches in any variant.

Axes: B rows of a forward, R rows, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, CorpusReader, tokens_digest
from lmdistill.signals.exchange.rows import split_entry
from lmdistill.signals.format import MANIFEST_FILE, Layout, Manifest, TeacherInfo
from lmdistill.signals.sampling import Sampling
from lmdistill.signals.statistics import Statistics
from lmdistill.signals.writer import ShardWriter, plan_shards
from lmdistill.teachers.chunks import LogitEngine, reduce_chunks
from lmdistill.teachers.draws import Drawn, draw_chunks
from lmdistill.teachers.engine import TopK

BATCH_ROWS, SHARD_ROWS = 8, 256  # the teach stage's defaults
TopKT = TypeVar("TopKT", bound=TopK)
Append = Callable[[ShardWriter, slice], None]  # gives a writer the rows of a split


@dataclass(frozen=True)
class Said:
    """Rows of tokens and the teacher's exact word on them: its top K, and ids drawn from it."""

    tokens_RT: NDArray[Any]
    flags_RT: NDArray[np.uint8]
    top: TopK
    drawn: Drawn

    def append(self, exact: TopK) -> Append:
        """Gives `exact`, one of the two, to a writer."""
        return lambda writer, rows: writer.append(self.tokens_RT[rows], self.flags_RT[rows], part(exact, rows))


def listen(engine: LogitEngine, corpus: CorpusReader, k: int, sampling: Sampling) -> Said:
    """Top K and draws of the corpus' training rows, both from one forward."""
    import torch

    split, top, drawn = corpus.split("train"), list[TopK](), list[Drawn]()
    tokens_RT, flags_RT = np.asarray(split.tokens_RT).astype(np.int32), np.asarray(split.flags_RT)
    for start in range(0, len(split), BATCH_ROWS):
        tokens_BT, flags_BT = tokens_RT[start : start + BATCH_ROWS], flags_RT[start : start + BATCH_ROWS]
        uniforms = sampling.uniforms("train", start, *tokens_BT.shape)
        with torch.inference_mode():
            chunks = list(engine.logit_chunks(tokens_BT, (flags_BT & DOC_START) != 0))
        top.append(reduce_chunks(chunks, tokens_BT, k))
        drawn.append(draw_chunks(iter(chunks), tokens_BT, uniforms, sampling))
    return Said(tokens_RT, flags_RT, joined(top), joined(drawn))


def part(exact: TopKT, rows: slice) -> TopKT:
    """Some of the rows."""
    return replace(exact, **{name: array[rows] for name, array in vars(exact).items()})


def joined(parts: Sequence[TopKT]) -> TopKT:
    """All rows of several."""
    columns = zip(*(vars(one).values() for one in parts), strict=True)
    return type(parts[0])(*(np.concatenate(column) for column in columns))


def write_cache(
    folder: Path, rows: int, append: Append, layout: Layout, corpus: CorpusReader, teacher: TeacherInfo
) -> Manifest:
    """A cache of one split, by the product's writer, in shards as the teach stage makes them."""
    folder.mkdir(parents=True)
    records, split = [], corpus.split("train")
    source = tokens_digest(split.tokens_RT, split.flags_RT)
    for job in plan_shards("train", rows, SHARD_ROWS):
        writer = ShardWriter(folder, job, layout, source)
        for start in range(job.span.start, job.span.stop, BATCH_ROWS):
            append(writer, slice(start, min(start + BATCH_ROWS, job.span.stop)))
        records.append(writer.commit())
    meta = corpus.meta
    manifest = Manifest(
        layout=layout,
        shard_rows=SHARD_ROWS,
        packing=meta.packing,
        tokenizer_digest=meta.tokenizer_digest,
        chat_template_digest=meta.chat_template_digest,
        teacher=teacher,
        splits={"train": split_entry(layout, source, records)},
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return manifest


def code_figures(
    said: Said, exact: TopK, decoded: Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32]]]
) -> dict[str, float]:
    """KL of the exact K entries and the rest from what a reader decodes: the figures of a cache's own statistics.

    `decoded` gives the log-probs `[R, T, K]` and the tail's log mass `[R, T]` of rows.
    """
    statistics = Statistics()
    for rows, logp_RTK, tail_RT in decoded:
        statistics.add(said.tokens_RT[rows], said.flags_RT[rows], part(exact, rows), logp_RTK, tail_RT)
    assert statistics.tokens == said.tokens_RT.size  # no padding in rows of `concat`
    found = statistics.summary(None)
    names = ("kl_mean", "kl_p50", "kl_p99", "kl_max", "sum_error_max", "head_mass", "observed_in_top_k", "teacher_nll")
    return {name: float(found[name] or 0) for name in names}
