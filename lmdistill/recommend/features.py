"""What is measured of the data before anything is trained: how much, how long, and what the teacher makes of it.

Axes: R rows, T tokens in a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS, PAD, CorpusReader
from lmdistill.pipeline.stage import Artefact, ModelRef
from lmdistill.recommend.request import Request, asset


@dataclass(frozen=True)
class Features:
    """Of the data, and of the teacher on a sample of it."""

    records: int  # in all sources
    looked_at: int  # of them
    empty: int
    duplicates: int
    tokens: int  # in all sources without duplicates, from the mean document
    bytes_per_token: float
    length_p50: int  # of documents, tokens
    length_p90: int
    length_max: int
    target_share: float  # of tokens that are learned from; in conversations the answers
    sample_tokens: int  # that the teacher read
    teacher_nll: float  # nats a token
    teacher_entropy: float  # of the top K and the rest as one: a lower bound
    head_mass: float  # of the top K
    observed: float  # share of tokens that are among the teacher's top K

    @property
    def surprise(self) -> float:
        """Loss beyond what the teacher itself expects: near 0 on text like its own, large on text foreign to it."""
        return self.teacher_nll - self.teacher_entropy


def measure(request: Request, corpus: Artefact, teach: Artefact) -> Features:
    """Features from the sample's artefacts."""
    built, taught = corpus.metrics, teach.metrics["splits"]["train"]
    reader = CorpusReader(corpus.out)
    flags = [np.asarray(split.flags_RT) for split in reader.splits.values()]
    lengths = np.concatenate([document_lengths(flags_RT) for flags_RT in flags])
    real = sum(int((flags_RT & PAD == 0).sum()) for flags_RT in flags)
    targets = sum(int((flags_RT & LOSS != 0).sum()) for flags_RT in flags)
    records = _count(request, built["records"])
    documents = built["documents"] * records / built["records"]
    p50, p90 = np.quantile(lengths, [0.5, 0.9])
    return Features(
        records=records,
        looked_at=built["records"],
        empty=built["empty"],
        duplicates=built["duplicates"],
        tokens=round(documents * float(lengths.mean())),
        bytes_per_token=built["bytes_per_token"],
        length_p50=round(float(p50)),
        length_p90=round(float(p90)),
        length_max=int(lengths.max()),
        target_share=targets / real,
        sample_tokens=taught["tokens"],
        teacher_nll=taught["teacher_nll"],
        teacher_entropy=taught["entropy"],
        head_mass=taught["head_mass"],
        observed=taught["observed_in_top_k"],
    )


def document_lengths(flags_RT: NDArray[Any]) -> NDArray[np.int64]:
    """Tokens of each document of rows that follow one another; the last may be cut."""
    flags = flags_RT.reshape(-1)
    flags = flags[flags & PAD == 0]
    starts = np.flatnonzero(flags & DOC_START)
    return np.diff(np.append(starts, len(flags)))


def _count(request: Request, looked_at: int) -> int:
    """Records of all sources; read whole only where a source has more than were looked at."""
    if looked_at < request.sample_records:
        return looked_at
    from lmdistill import assets
    from lmdistill.corpus.config import Source
    from lmdistill.corpus.load import load
    from lmdistill.recommend.samples import source_keys

    keys = source_keys(request)
    total = 0
    for source in request.sources:
        path = assets.available(asset("data", source))
        assert path is not None  # the sample was made from it
        total += len(load(Source.model_validate({"source": source, **keys}), path, request.work / "count"))
    return total


def teacher_shape(teacher: ModelRef) -> dict[str, Any]:
    """The teacher's config.json."""
    shape: dict[str, Any] = json.loads((teacher.path / "config.json").read_text(encoding="utf-8"))
    return shape


def describe(features: Features, k: int) -> Sequence[str]:
    """The features as sentences."""
    part = "" if features.looked_at == features.records else f", {features.looked_at:,} of them looked at"
    return [
        f"Data: {features.records:,} records{part} ({features.duplicates:,} repeated, {features.empty:,} empty), about "
        f"{features.tokens:,} tokens of {features.bytes_per_token:.2f} bytes.",
        f"Documents: {features.length_p50:,} tokens in the median, {features.length_p90:,} at the 90th percentile, "
        f"{features.length_max:,} at most in the sample; {features.target_share:.0%} of tokens are learned from.",
        f"Teacher on {features.sample_tokens:,} tokens of it: loss {features.teacher_nll:.3f} nats, entropy at least "
        f"{features.teacher_entropy:.3f}; its top {k} hold {features.head_mass:.0%} of its mass and "
        f"{features.observed:.0%} of the tokens that came.",
    ]
