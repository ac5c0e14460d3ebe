"""A corpus read as a teacher cache without entries: what a live teacher needs, and no more.

Axes: R rows of a batch, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.format import CorpusReader
from lmdistill.signals.batch import SignalsBatch


@dataclass(frozen=True)
class CorpusAbout:
    """What training asks of a cache's manifest."""

    packing: str
    tokenizer_digest: str


class CorpusRows:
    """One split of the corpus in `folder` with the reading side of a `SignalsReader`; IntegrityError as there."""

    sampled = False

    def __init__(self, folder: Path, split: str = "train") -> None:
        corpus = CorpusReader(folder)
        self.folder, self._split = corpus.folder, corpus.split(split)
        self.digest = self.corpus_digest = corpus.digest(split)
        self.row_tokens = corpus.meta.sequence_length
        self.manifest = CorpusAbout(corpus.meta.packing, corpus.meta.tokenizer_digest)

    @property
    def rows(self) -> int:
        """Rows R of the split."""
        return len(self._split)

    def read(self, rows: Sequence[int] | NDArray[Any]) -> SignalsBatch:
        """The asked rows in the asked order: tokens and flags, K = 0, and all mass in the tail."""
        chosen = np.asarray(rows, dtype=np.int64)
        batch = SignalsBatch.empty(chosen, self.row_tokens, 0)
        batch.tokens_RT[:] = self._split.tokens_RT[chosen]
        batch.flags_RT[:] = self._split.flags_RT[chosen]
        batch.tail_RT.fill(0.0)
        batch.lp_next_RT.fill(np.nan)
        return batch
