"""Reads a teacher cache: random access by row, decoded to arrays a loss can use, proven on every batch.

Axes: R rows of a batch, T tokens in a row, K entries of a token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.signals import variant as variants
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.format import Manifest, ShardEntry, find_folder, load_manifest
from lmdistill.signals.hidden import F32
from lmdistill.signals.hidden_files import HiddenReader
from lmdistill.signals.integrity import shard_problems

__all__ = ["SignalsBatch", "SignalsReader"]
DECODE_ROWS = 16  # rows decoded at a time: their temporaries stay in the processor's cache


class SignalsReader:
    """One split of the cache in `folder` (an artefact or its out/).

    Raises IntegrityError for an unknown version, a shard whose size or sha256 is off (checked when it is first
    opened, unless `verify` is False), and log-probs that do not belong to their tokens.
    """

    def __init__(self, folder: Path, split: str = "train", verify: bool = True) -> None:
        self.folder = find_folder(Path(folder))
        self.manifest: Manifest = load_manifest(self.folder)
        if split not in self.manifest.splits:
            raise IntegrityError(
                f"the teacher cache {self.folder} has no split '{split}'",
                why=f"it has {', '.join(self.manifest.splits)}",
                fix=f"add '{split}' to the teach stage's `splits`",
            )
        self.split, self.verify = split, verify
        self._shards = self.manifest.splits[split].shards
        self._firsts = [shard.first_row for shard in self._shards]
        self._variant = variants.get(self.manifest.layout.variant)
        self._open: dict[int, variants.StoredRows] = {}
        self._hidden: HiddenReader | None = None
        self._memory = variants.Memory()
        for shard in self._shards:
            self._check_size(shard)

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        """Workers of a data loader open the shards themselves."""
        return {**self.__dict__, "_open": {}, "_memory": variants.Memory()}

    @property
    def rows(self) -> int:
        """Rows R of the split."""
        return self.manifest.splits[self.split].rows

    @property
    def row_tokens(self) -> int:
        """Tokens T of a row."""
        return self.manifest.layout.row_tokens

    @property
    def k(self) -> int:
        """Entries K of a token."""
        return self.manifest.layout.k

    @property
    def sampled(self) -> bool:
        """Whether the ids were drawn from the teacher, and have weights; else they are its top K."""
        return self.manifest.layout.sampling is not None

    @property
    def vocab_size(self) -> int:
        """Real vocabulary V: every id is below it."""
        return self.manifest.layout.vocab_size

    @property
    def digest(self) -> str:
        """Identity of the cache: changes with any byte of any shard."""
        return self.manifest.digest

    @property
    def corpus_digest(self) -> str:
        """Identity of the split's tokens and flags, whoever scored them."""
        return self.manifest.splits[self.split].corpus_digest

    @property
    def statistics(self) -> dict[str, float | int | None]:
        """What the writer measured on this split (head_mass, teacher_nll, …; see docs/signals.md)."""
        return self.manifest.splits[self.split].statistics

    def read(self, rows: Sequence[int] | NDArray[Any] | slice) -> SignalsBatch:
        """The asked rows in the asked order; raises IntegrityError where they fail the alignment proof."""
        chosen = self._chosen(rows)
        batch = SignalsBatch.empty(chosen, self.row_tokens, self.k, self.sampled)
        for start in range(0, len(chosen), DECODE_ROWS):
            self._decode(batch.part(slice(start, start + DECODE_ROWS)))
        return batch

    def hidden(self, rows: Sequence[int] | NDArray[Any] | slice) -> F32:
        """The teacher's hidden states `[R, T, L, D]` of the asked rows, in the order of the recipe's `hidden_layers`.

        Raises IntegrityError where the cache holds none, or their file is damaged.
        """
        if self._hidden is None:
            self._hidden = HiddenReader(self.folder, self.manifest.layout, self._shards)
        return self._hidden.read(self._chosen(rows), self.verify)

    def _chosen(self, rows: Sequence[int] | NDArray[Any] | slice) -> NDArray[np.int64]:
        chosen = np.arange(self.rows)[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.rows):
            raise LmdistillError(f"row {chosen.min()}…{chosen.max()} asked of a split of {self.rows} rows")
        return chosen

    def _decode(self, batch: SignalsBatch) -> None:
        found = self._variant.decode(self.manifest.layout, self._raw(batch.rows), batch)
        if found is None:
            return
        row = int(batch.rows[found.row])
        shard = self._shards[self._shard_of(row)]
        raise IntegrityError(
            f"the log-probs in {shard.file}, row {row} of '{self.split}', do not belong to its tokens",
            why=f"position {found.position}: the next token has log-prob {found.expected:.4f}, the entries say "
            f"{found.decoded:.4f}; {found.failures} of {found.checked} positions differ. Likely: tokens and "
            "log-probs shifted by one, tokens of another tokenizer, or a shard of another cache",
            fix="delete this shard or the artefact and run the teach stage again",
        )

    def _raw(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The coded rows."""
        dtype = self._variant.dtype(self.manifest.layout)
        raw = np.empty((len(rows), dtype.itemsize), np.uint8)
        shards = [self._shard_of(row) for row in rows.tolist()]
        for index in sorted(set(shards)):
            places = [place for place, shard in enumerate(shards) if shard == index]
            wanted = (rows[places] - self._shards[index].first_row).tolist()
            self._shard(index).copy_rows(wanted, [raw[place] for place in places])
        return raw.view(dtype)[:, 0]

    def _shard_of(self, row: int) -> int:
        return bisect_right(self._firsts, row) - 1

    def _shard(self, index: int) -> variants.StoredRows:
        """A shard's rows; its bytes are checked when it is first asked for."""
        if index not in self._open:
            shard = self._shards[index]
            problems = shard_problems(self.folder, shard, self.manifest.layout) if self.verify else []
            if problems:
                raise IntegrityError(
                    f"shard {shard.file} of {self.folder} is damaged",
                    why="; ".join(problems[:4]),
                    fix="delete that shard's files and run the teach stage again: it alone is recomputed",
                )
            self._open[index] = self._variant.open(
                self.folder / shard.file, self.manifest.layout, shard.rows, self._memory
            )
        return self._open[index]

    def _check_size(self, shard: ShardEntry) -> None:
        path = self.folder / shard.file
        found = path.stat().st_size if path.exists() else -1
        if found != shard.bytes:
            raise IntegrityError(
                f"shard {path} " + ("is missing" if found < 0 else f"has {found} bytes, not {shard.bytes}"),
                fix="run the teach stage again: this shard alone is recomputed",
            )
