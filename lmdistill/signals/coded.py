"""Coded rows: what every variant of the top-K cache stores, whatever its bytes are; coding and decoding them.

Axes: R rows, T tokens in a row, K entries of a token.
A coded row is one plane a field, each contiguous. Coding is where precision is lost; storing loses nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.signals.alignment import Misaligned, Proof, check_alignment
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.format import Layout
from lmdistill.teachers.engine import TopK


def row_dtype(layout: Layout) -> np.dtype[Any]:
    """One coded row [T]: planes of tokens, flags, top-1, tail, lp_next, ids and gap codes; packed, little-endian."""
    row_tokens, k = layout.row_tokens, layout.k
    fields: list[tuple[str, str, tuple[int, ...]]] = [
        ("token", "<u2", (row_tokens,)),
        ("flags", "u1", (row_tokens,)),
        ("top1", "<f2", (row_tokens,)),
        ("tail", "<f2", (row_tokens,)),
        ("lp_next", "<f2", (row_tokens,)),
        ("ids", "<u2", (row_tokens, k)),
        ("gaps", "u1", (row_tokens, k - 1)),
    ]
    if layout.wide:
        fields += [("token_high", "u1", (row_tokens,)), ("ids_high", "u1", (row_tokens, k))]
    if layout.variable:
        fields += [("kept", "u1" if k <= 256 else "<u2", (row_tokens,))]
    return np.dtype(fields)


def joined(layout: Layout, raw_R: NDArray[Any], name: str) -> NDArray[np.int64]:
    """The plane "token" or "ids" with its high plane."""
    whole: NDArray[np.int64] = raw_R[name].astype(np.int64)
    if layout.wide:
        whole += raw_R[f"{name}_high"].astype(np.int64) << 16
    return whole


def split(layout: Layout, raw_R: NDArray[Any], name: str, values: NDArray[Any]) -> None:
    """Store "token" or "ids", with the high plane where there is one."""
    raw_R[name] = values & 0xFFFF if layout.wide else values
    if layout.wide:
        raw_R[f"{name}_high"] = values >> 16


def kept_mask(layout: Layout, raw_R: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which entries count `[R, T, K]`, where their number varies; else None."""
    if not layout.variable:
        return None
    mask: NDArray[np.bool_] = np.arange(layout.k) <= raw_R["kept"][..., None]
    return mask


def code_rows(layout: Layout, tokens_RT: NDArray[Any], flags_RT: NDArray[np.uint8], exact: TopK) -> NDArray[Any]:
    """What a teacher said of rows of tokens, as coded rows [R]."""
    raw_R = np.empty(len(tokens_RT), row_dtype(layout))
    code = layout.companding.encode(exact.logp_BTK, exact.tail_BT)
    split(layout, raw_R, "token", tokens_RT)
    split(layout, raw_R, "ids", exact.ids_BTK)
    raw_R["flags"] = flags_RT
    raw_R["top1"], raw_R["tail"], raw_R["gaps"] = code.top1_N, code.tail_N, code.gaps_NK
    with np.errstate(over="ignore"):  # below −65,504 nats it is −inf
        raw_R["lp_next"] = exact.lp_next_BT
    if layout.variable:
        raw_R["kept"] = np.isfinite(exact.logp_BTK).sum(axis=-1) - 1
    return raw_R


def decode_rows(
    layout: Layout, raw_R: NDArray[Any], batch: SignalsBatch, unlisted_RT: NDArray[np.float32] | None = None
) -> Misaligned | None:
    """Decode coded rows into the arrays of `batch`; says where the log-probs do not belong to the tokens.

    `unlisted_RT`: see `check_alignment`.
    """
    tokens, ids = batch.tokens_RT, batch.ids_RTK
    tokens[...], ids[...] = raw_R["token"], raw_R["ids"]
    same_RTK = np.zeros(ids.shape, bool)
    np.equal(raw_R["ids"][:, :-1], raw_R["token"][:, 1:, None], out=same_RTK[:, :-1])
    if layout.wide:
        tokens += raw_R["token_high"].astype(np.int32) << 16
        ids += raw_R["ids_high"].astype(np.int32) << 16
        same_RTK[:, :-1] &= raw_R["ids_high"][:, :-1] == raw_R["token_high"][:, 1:, None]
    batch.flags_RT[...] = raw_R["flags"]
    batch.tail_RT[...] = raw_R["tail"]
    batch.lp_next_RT[...] = raw_R["lp_next"]
    gaps_RTK = np.ascontiguousarray(raw_R["gaps"])
    layout.companding.decode(raw_R["top1"], gaps_RTK, batch.logp_RTK)
    kept_RTK, kept_RT = kept_mask(layout, raw_R), None
    if kept_RTK is not None:
        batch.logp_RTK[~kept_RTK] = -np.inf
        same_RTK &= kept_RTK
        kept_RT = raw_R["kept"].astype(np.int64)
    proof = Proof(layout.companding, layout.cut_from or layout.k, layout.open_next is True)
    return check_alignment(same_RTK, gaps_RTK, batch.logp_RTK, batch.lp_next_RT, proof, kept_RT, unlisted_RT)
