"""Toy teachers and corpora for the teacher cache's tests; run as a script it captures slowly, to be killed.

python signals_synthetic.py CORPUS_FOLDER OUT_FOLDER VARIANT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS, CorpusMeta, CorpusReader, SplitMeta, token_dtype, tokens_digest
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.signals.alignment import Misaligned
from lmdistill.signals.capture import Capture
from lmdistill.signals.format import Layout, Manifest, SplitEntry, TeacherInfo
from lmdistill.signals.variants import compact
from lmdistill.signals.writer import ShardWriter, plan_shards, source_digest
from lmdistill.teachers.engine import TopK

VOCAB, K, LENGTH, SHARD_ROWS, BATCH_ROWS = 64, 8, 16, 4, 2
TEACHER = TeacherInfo("synthetic", "0" * 64, "float32", "synthetic", "1")


def exact_top_k(logits_RTV: NDArray[Any], tokens_RT: NDArray[Any], k: int) -> TopK:
    """The float64 reference of what an engine returns."""
    wide = logits_RTV.astype(np.float64)
    logp = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    order = np.argsort(-logp, axis=-1, kind="stable")
    ranked = np.take_along_axis(logp, order, -1)
    tail = np.logaddexp.reduce(ranked[..., k:], axis=-1) if k < ranked.shape[-1] else np.full(ranked.shape[:2], -np.inf)
    lp_next = np.take_along_axis(logp, np.roll(tokens_RT, -1, 1)[..., None].astype(np.int64), -1)[..., 0]
    lp_next[:, -1] = np.nan
    ids = order[..., :k].astype(np.int32)
    return TopK(ids, ranked[..., :k].astype("f4"), tail.astype("f4"), lp_next.astype("f4"))


def sample_rows(rng: np.random.Generator, logits_RTV: NDArray[Any]) -> NDArray[np.int32]:
    """Tokens [R, T] that the given predictions would say."""
    noise = rng.gumbel(size=logits_RTV.shape)
    said = (logits_RTV + noise).argmax(-1)
    return np.roll(said, 1, axis=1).astype(np.int32)


def random_rows(
    seed: int, rows: int, length: int, vocab: int, k: int, scale: float = 3.0
) -> tuple[NDArray[np.int32], NDArray[np.uint8], TopK]:
    """Tokens, flags and a teacher's predictions that belong together."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, length, vocab)).astype("f4")
    tokens = sample_rows(rng, logits)
    return tokens, plain_flags(rows, length), exact_top_k(logits, tokens, k)


def plain_flags(rows: int, length: int) -> NDArray[np.uint8]:
    """One document a row, every position but the last a target."""
    flags = np.full((rows, length), LOSS, np.uint8)
    flags[:, 0] |= DOC_START
    flags[:, -1] &= ~LOSS & 0xFF
    return flags


class BigramEngine:
    """A deterministic teacher: the next token depends on the last one alone."""

    def __init__(self, seed: int = 0, k: int = K, vocab: int = VOCAB, seconds: float = 0.0) -> None:
        self.table_VV = np.random.default_rng(seed).normal(0, 3, (vocab, vocab)).astype("f4")
        self.k, self.seconds, self.rows_scored = k, seconds, 0

    def score(self, tokens_BT: NDArray[Any], starts_BT: NDArray[np.bool_]) -> TopK:
        time.sleep(self.seconds)
        self.rows_scored += len(tokens_BT)
        return exact_top_k(self.table_VV[tokens_BT], tokens_BT, self.k)

    def version(self) -> str:
        return TEACHER.engine_version

    def text(self, seed: int, rows: int, length: int = LENGTH) -> NDArray[np.int32]:
        """Rows that this teacher says."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, len(self.table_VV), (rows, length)).astype(np.int32)
        for t in range(1, length):
            tokens[:, t] = (self.table_VV[tokens[:, t - 1]] + rng.gumbel(size=(rows, len(self.table_VV)))).argmax(-1)
        return tokens


def write_corpus(folder: Path, splits: dict[str, NDArray[Any]], vocab: int = VOCAB, packing: str = "concat") -> None:
    """A corpus folder (without a tokenizer) holding the given rows of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    metas = {}
    for name, tokens in splits.items():
        rows, length = tokens.shape
        flags, stored = plain_flags(rows, length), tokens.astype(token_dtype(vocab))
        np.save(folder / f"{name}.tokens.npy", stored)
        np.save(folder / f"{name}.flags.npy", flags)
        np.save(folder / f"{name}.bytes.npy", np.full(rows, length - 1, np.uint32))
        metas[name] = SplitMeta(
            rows, rows, rows * length, rows * (length - 1), rows * (length - 1), tokens_digest(stored, flags)
        )
    length = next(iter(splits.values())).shape[1]
    meta = CorpusMeta(length, packing, vocab, "t" * 64, None, None, 0, metas)
    (folder / "corpus.json").write_text(meta.to_json())


def capture(
    corpus: Path, out: Path, engine: Any, splits: tuple[str, ...] = ("train",), variant: str = "mmap"
) -> Capture:
    """A capture of toy size, ready to run."""
    reader = CorpusReader(corpus)
    layout = Layout(reader.meta.sequence_length, engine.k, reader.meta.vocab_size, variant)
    return Capture(
        out, reader, splits, layout, TEACHER, lambda: engine, SHARD_ROWS, BATCH_ROWS, progress=SilentProgress()
    )


class CredulousWriter(ShardWriter):
    """Writes predictions that do not belong to their tokens, for readers to refuse."""

    def refuse(self, found: Misaligned | None) -> None:
        """Take them."""


def write_cache(
    out: Path,
    tokens: NDArray[Any],
    flags: NDArray[np.uint8],
    exact: TopK,
    vocab: int,
    shard_rows: int = 4,
    **layout_keys: Any,
) -> Manifest:
    """A cache of the given predictions, whether or not they belong to the tokens."""
    out.mkdir(parents=True, exist_ok=True)
    layout = Layout(tokens.shape[1], exact.ids_BTK.shape[-1], vocab, **layout_keys)
    source, entries, writer = source_digest(layout, TEACHER, tokens, flags), [], None
    for job in plan_shards("train", len(tokens), shard_rows):
        writer = CredulousWriter(out, job, layout, source)
        columns = (exact.ids_BTK, exact.logp_BTK, exact.tail_BT, exact.lp_next_BT)
        writer.append(tokens[job.span], flags[job.span], TopK(*(column[job.span] for column in columns)))
        entries.append(writer.commit().entry)
    split = SplitEntry(len(tokens), "c" * 64, tuple(entries), {})
    manifest = Manifest(layout, shard_rows, "concat", "t" * 64, None, TEACHER, {"train": split})
    (out / "signals.json").write_text(manifest.to_json())
    return manifest


def always(blocks: list[bytes], rows: NDArray[Any]) -> bool:
    """Stands in for `compact.pays`: toys are smaller as they are, and then packing would not be tested."""
    return True


if __name__ == "__main__":
    compact.pays = always
    corpus_folder, out_folder, name = sys.argv[1:]
    capture(Path(corpus_folder), Path(out_folder), BigramEngine(seconds=0.01), ("train", "valid"), name).run()
