"""vLLM's log-probs of prompts as arrays, and from them the top K with the tail's mass: no loop per entry.

Axes: N positions, K entries of a position. An answer has, for each position but the first, the log-prob of the token
that is there and those of the K most likely ones, in float32 over the model's whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import StageError

LEAST_TAIL = 2.0**-24  # float32's resolution at 1: a tail known as 1 − head cannot be told from less


class FlatLogprobs(Protocol):
    """The layout of `vllm.logprobs.FlatLogprobs`: one list over all entries, and each position's range in it."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Entries:
    """What was said of N tokens of a prompt, each from the position before it."""

    token_N: NDArray[np.int64]  # the token that is there
    lp_token_N: NDArray[np.float64]
    ids_NK: NDArray[np.int64]  # the K most likely, likeliest first
    logp_NK: NDArray[np.float64]


def from_flat(flat: FlatLogprobs, k: int) -> Entries:
    """Entries of vLLM's flat layout: none at position 0, then K+1 each, the token that is there before the K.

    That token stands among the K too where it is one of them, so the first column is dropped, whatever its rank
    says: ranks count ties. Raises StageError where the layout is another.
    """
    count = len(flat.start_indices)
    expected_N = np.maximum(np.arange(count + 1) - 1, 0) * (k + 1)  # where a position begins and the one before ends
    as_expected = [flat.start_indices, flat.end_indices] == [expected_N[:-1].tolist(), expected_N[1:].tolist()]
    if count < 2 or not as_expected or {len(flat.token_ids), len(flat.logprobs)} != {expected_N[-1]}:
        raise _not_understood(f"{count} positions are not each of {k + 1} entries, the first of none")
    ids_NK = np.asarray(flat.token_ids, np.int64).reshape(-1, k + 1)
    logp_NK = np.asarray(flat.logprobs, np.float64).reshape(-1, k + 1)
    return Entries(ids_NK[:, 0], logp_NK[:, 0], ids_NK[:, 1:], logp_NK[:, 1:])


def from_json(listing: Sequence[Mapping[str, Mapping[str, Any]] | None], k: int) -> Entries:
    """Entries of a server's `prompt_logprobs`: null, then id → {logprob, rank} in vLLM's order, an id once.

    The token that is there comes first. Where it is one of the K its rank is its place among them, else it is above K.
    Raises StageError where the layout is another.
    """
    if len(listing) < 2 or listing[0] is not None or None in listing[1:]:
        raise _not_understood("prompt_logprobs is no list of null and then one mapping a token")
    positions = [position for position in listing[1:] if position is not None]
    widths_N = np.fromiter(map(len, positions), np.int64, len(positions))
    total = int(widths_N.sum())
    values = list(chain.from_iterable(map(_values, positions)))
    try:
        ids = np.fromiter(map(int, chain.from_iterable(positions)), np.int64, total)
        logp = np.fromiter(map(itemgetter("logprob"), values), np.float64, total)
        rank = np.fromiter(map(itemgetter("rank"), values), np.int64, total)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_understood(repr(error)) from error
    first_N = np.cumsum(widths_N) - widths_N
    at = np.repeat(np.arange(len(positions)), widths_N)
    kept = np.flatnonzero(rank <= k)
    if not (widths_N > 0).all() or (np.bincount(at[kept], minlength=len(positions)) != k).any():
        raise _not_understood(f"positions without exactly {k} entries of rank 1 to {k}")
    kept = kept[np.lexsort((rank[kept], at[kept]))]
    return Entries(ids[first_N], logp[first_N], ids[kept].reshape(-1, k), logp[kept].reshape(-1, k))


def _values(position: Mapping[str, Mapping[str, Any]]) -> Any:
    return position.values()


def top_k(entries: Entries, vocab_size: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """(ids [N, K], log-probs [N, K], tail [N]) of entries: descending, among equals the lower id first.

    The tail is 1 − head, in float64, since no other entry is known: off by as much mass as float32 rounded the head,
    some 1e-6. Where little is left it is held between what is certain of it: no id outside the K is likelier than the
    K-th, and the token that is there, where it is outside, is in the tail.
    Raises StageError where one of the K is no token of the tokenizer: its mass cannot be taken from the others.
    """
    ids_NK, logp_NK = entries.ids_NK, entries.logp_NK
    if ids_NK.max(initial=0) >= vocab_size:
        raise StageError(
            f"the teacher says ids that its tokenizer does not have, such as {int(ids_NK.max())} of {vocab_size}",
            why="its logits are padded, the padding has mass among the K most likely, and vLLM sums over it",
            fix="use `engine: transformers`, which cuts the padding before it sums",
        )
    order_NK = np.lexsort((ids_NK, -logp_NK), axis=-1)
    ids_NK = np.take_along_axis(ids_NK, order_NK, axis=-1)
    logp_NK = np.take_along_axis(logp_NK, order_NK, axis=-1)
    k = ids_NK.shape[-1]
    if k >= vocab_size:
        return ids_NK.astype(np.int32), logp_NK.astype(np.float32), np.full(len(ids_NK), -np.inf, np.float32)
    rest_N = np.maximum(1.0 - np.exp(logp_NK).sum(axis=-1), LEAST_TAIL)
    rest_N = np.minimum(rest_N, (vocab_size - k) * np.exp(logp_NK[:, -1]))
    outside_N = (ids_NK != entries.token_N[:, None]).all(axis=-1)
    rest_N = np.maximum(rest_N, np.where(outside_N, np.exp(entries.lp_token_N), 0.0))
    with np.errstate(divide="ignore"):
        tail_N = np.maximum(np.log(rest_N), np.finfo(np.float32).min)
    return ids_NK.astype(np.int32), logp_NK.astype(np.float32), tail_N.astype(np.float32)


def _not_understood(why: str) -> StageError:
    return StageError(
        "vLLM's log-probs are not laid out as expected", why=why, fix="use a version of vLLM that docs/signals.md names"
    )
