"""Documents into rows of T tokens, with flags and byte counts.

- concat, isolate: documents follow each other and go on in the next row; only the split's last row is padded.
- single: one piece of one document a row, padded at its end; what is longer than a row goes on in further rows.

What leaks from one document into the next of a row:
- concat: everything before it.
- isolate, where the trainer resets positions and attention at DOC_START: nothing in attention models. A short
  convolution of kernel k lets k - 1 tokens through, and n of them one after the other n(k - 1); attention after a
  convolution carries that on to all later tokens of the document.
- single: nothing, in any causal model.

Axes: R rows, T tokens in a row, V vocabulary, N tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.corpus.documents import Documents, Indices
from lmdistill.corpus.format import DOC_START, LOSS, PAD, SplitMeta, token_dtype, tokens_digest

BLOCK = 4096  # rows at a time


@dataclass(frozen=True)
class Rows:
    """How a split is packed."""

    length: int  # T
    single: bool
    cap: int | None  # most rows
    pad_id: int
    vocab_size: int


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of the flat documents that go to `place` of the flat rows."""

    place: int
    start: int
    stop: int
    opens: bool  # begins its document


def pieces(documents: Documents, order: Indices, rows: Rows) -> Iterator[Piece]:
    """Where every document goes, in order, until the cap is reached."""
    place, length = 0, rows.length
    room = None if rows.cap is None else rows.cap * length
    for index in order:
        start, end = int(documents.starts_D[index]), int(documents.starts_D[index + 1])
        begin = start
        while begin < end:
            if room is not None and place >= room:
                return
            limit = length if rows.single else (end - begin if room is None else room - place)
            stop = min(end, begin + limit)
            yield Piece(place, begin, stop, opens=begin == start)
            place += length if rows.single else stop - begin
            begin = stop


def pack(documents: Documents, order: Indices, rows: Rows, bytes_V: NDArray[np.uint32], stem: Path) -> SplitMeta | None:
    """Write `<stem>.tokens.npy`, `.flags.npy`, `.bytes.npy`, perhaps `.success.npy`; None where no row has a target.

    Rows without a target (a tail of one token, a conversation's part without the assistant) are left out.
    """
    end, opened = 0, 0
    for piece in pieces(documents, order, rows):
        end, opened = piece.place + piece.stop - piece.start, opened + piece.opens
    count = -(-end // rows.length)
    if count == 0:
        return None
    dtype = token_dtype(rows.vocab_size)
    tokens_RT = _created(f"{stem}.all-tokens.npy", dtype, (count, rows.length))
    flags_RT = _created(f"{stem}.all-flags.npy", np.dtype(np.uint8), (count, rows.length))
    _fill(documents, order, rows, tokens_RT.reshape(-1), flags_RT.reshape(-1))
    flags_RT[:, -1] &= np.uint8(0xFF ^ LOSS)  # the target of a row's last prediction is in no row
    kept = np.flatnonzero((flags_RT & LOSS).any(axis=1))
    meta = _write(tokens_RT, flags_RT, kept, bytes_V, stem, opened) if len(kept) else None
    if meta is not None and np.isfinite(documents.success_D[order]).any():
        np.save(f"{stem}.success.npy", _success(documents, order, rows, count)[kept], allow_pickle=False)
    for kind in ("tokens", "flags"):
        Path(f"{stem}.all-{kind}.npy").unlink()
    return meta


def _created(path: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A new memory-mapped npy file."""
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return array


def _fill(documents: Documents, order: Indices, rows: Rows, tokens: NDArray[Any], flags: NDArray[np.uint8]) -> None:
    """Copy every piece to its place in the flat rows; LOSS goes one before each target of the same document."""
    tokens[:] = rows.pad_id
    flags[:] = PAD
    for piece in pieces(documents, order, rows):
        stop = piece.place + piece.stop - piece.start
        tokens[piece.place : stop] = documents.ids_N[piece.start : piece.stop]
        targets = documents.targets_N[piece.start + 1 : piece.stop]
        flags[piece.place : stop - 1] = np.where(targets, np.uint8(LOSS), np.uint8(0))
        flags[stop - 1] = 0
        if piece.opens:
            flags[piece.place] |= DOC_START


def _success(documents: Documents, order: Indices, rows: Rows, count: int) -> NDArray[np.float32]:
    """The success rate of each of `count` rows: the mean over its tokens that may be targets, f32."""
    sums_R, tokens_R = np.zeros(count), np.zeros(count)
    for piece in pieces(documents, order, rows):
        document = int(np.searchsorted(documents.starts_D, piece.start, side="right")) - 1
        targets = np.flatnonzero(documents.targets_N[piece.start : piece.stop])
        at = (piece.place + targets) // rows.length
        np.add.at(sums_R, at, documents.success_D[document])
        np.add.at(tokens_R, at, 1)
    return (sums_R / np.maximum(1, tokens_R)).astype(np.float32)


def _write(
    tokens_RT: NDArray[Any],
    flags_RT: NDArray[np.uint8],
    kept: NDArray[np.int64],
    bytes_V: NDArray[np.uint32],
    stem: Path,
    documents: int,
) -> SplitMeta:
    """Write the kept rows and their byte counts, block by block."""
    shape = (len(kept), tokens_RT.shape[1])
    tokens = _created(f"{stem}.tokens.npy", tokens_RT.dtype, shape)
    flags = _created(f"{stem}.flags.npy", flags_RT.dtype, shape)
    bytes_R = np.empty(len(kept), dtype=np.uint32)
    present, targets = 0, 0
    for start in range(0, len(kept), BLOCK):
        block = slice(start, start + BLOCK)
        tokens[block], flags[block] = tokens_RT[kept[block]], flags_RT[kept[block]]
        counted = (flags[block, :-1] & LOSS) != 0
        bytes_R[block] = (bytes_V[tokens[block, 1:]] * counted).sum(axis=1)
        targets += int(counted.sum())
        present += int(((flags[block] & PAD) == 0).sum())
    np.save(f"{stem}.bytes.npy", bytes_R, allow_pickle=False)
    return SplitMeta(
        rows=len(kept),
        documents=documents,
        tokens=present,
        targets=targets,
        target_bytes=int(bytes_R.sum(dtype=np.int64)),
        digest=tokens_digest(tokens, flags),
    )
