"""Small corpora for the teach stage, and the contexts it is checked and run in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import DOC_START, LOSS, CorpusMeta, SplitMeta, tokens_digest
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageConfig, StageContext
from lmdistill.stages.teach import TeachConfig


def save_corpus(folder: Path, tokens_RT: NDArray[Any], vocab: int, packing: str = "concat") -> Artefact:
    """A corpus artefact of these rows, a document each; its tokenizer/ is the caller's."""
    out, (rows, length) = folder / "out", tokens_RT.shape
    out.mkdir(parents=True, exist_ok=True)
    tokens = tokens_RT.astype("<u2")
    flags = np.full(tokens.shape, LOSS, np.uint8)
    flags[:, 0], flags[:, -1] = LOSS | DOC_START, 0
    for kind, array in {"tokens": tokens, "flags": flags, "bytes": np.full(rows, length - 1, "u4")}.items():
        np.save(out / f"train.{kind}.npy", array)
    targets = rows * (length - 1)
    split = SplitMeta(rows, rows, rows * length, targets, targets, tokens_digest(tokens, flags))
    meta = CorpusMeta(length, packing, vocab, "t" * 64, None, None, 0, {"train": split})
    (out / "corpus.json").write_text(meta.to_json())
    return Artefact("corpus", "corpus", "corpus", "f" * 64, folder)


def before(teacher: ModelRef | None, artefact: Artefact, folder: Path, **config: Any) -> PreflightContext[TeachConfig]:
    """What the stage's preflight is given."""
    planned = Planned("corpus", "corpus", "corpus", "f" * 64, StageConfig(), artefact=artefact)
    return PreflightContext("teach", TeachConfig(**config), {"corpus": [planned]}, teacher, folder)


def running(teacher: ModelRef, artefact: Artefact, folder: Path, **config: Any) -> StageContext[TeachConfig]:
    """What the stage's run is given."""
    settings = TeachConfig(**({"k": 8, "shard_rows": 4, "batch_rows": 2} | config))
    runtime = Runtime(device="cpu", threads=1)
    return StageContext(
        "teach", settings, {"corpus": [artefact]}, teacher, folder / "out", folder / "work", runtime=runtime
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
