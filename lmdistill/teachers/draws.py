"""Draws ids from a teacher's full distribution, for a loss that is right in the mean (losses/sampled_kd.py).

Axes: B rows, T tokens in a row, N tokens, n draws of a token (and the most ids it can have), C tokens of a chunk,
V vocabulary, G groups of S = 64 neighbouring ids.
Which ids come is the uniforms' doing (`signals/sampling.py`): they are looked up in the cumulative mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import PreflightError
from lmdistill.signals.sampling import Sampling
from lmdistill.teachers.chunks import Chunks
from lmdistill.teachers.engine import TeacherEngine, TopK
from lmdistill.teachers.registry import ENGINES

GROUP = 64  # ids summed together: a draw finds its group, then its id
CPU_TOKENS = 16  # float32 logits of so many tokens stay in the processor's cache
LEAST_TAIL = 1e-12  # mass outside the drawn ids below which it counts as this: finite


@dataclass(frozen=True)
class Drawn(TopK):
    """What was drawn: the ids are those, likeliest first; what is left of K repeats the first with log-prob −inf."""

    counts_BTK: NDArray[np.uint8]  # how often each came
    log_z_BT: NDArray[np.float32]  # log Σ p^t: the proposal is r = p^t/z; 0 at t = 1


def check_draws(engine: str) -> None:
    """Raise PreflightError where the engine tells only its top K: what is drawn may lie outside of them."""
    if ENGINES[engine].logits:
        return
    able = sorted(name for name, entry in ENGINES.items() if entry.logits)
    raise PreflightError(
        f"engine '{engine}' cannot draw ids from the teacher",
        why="it tells the likeliest ids only, and a draw needs every id's probability",
        fix=f"use one of: {', '.join(able)}; or another `variant` than sampled",
    )


def score(
    engine: TeacherEngine,
    sampling: Sampling | None,
    at: tuple[str, int],
    tokens_BT: NDArray[Any],
    starts_BT: NDArray[np.bool_],
) -> TopK:
    """What the engine says of rows of tokens: its top K, or with `sampling` what is drawn from its distribution.

    `at` is the split and the number of the first row: all that the draws depend on beside the seed.
    """
    if sampling is None:
        return engine.score(tokens_BT, starts_BT)
    teller: Any = engine  # `logits` in the registry says that it yields them
    return draw_chunks(
        teller.logit_chunks(tokens_BT, starts_BT), tokens_BT, sampling.uniforms(*at, *tokens_BT.shape), sampling
    )


def draw(logits_NV: Any, uniforms_Nn: Any, next_N: Any, temperature: float) -> tuple[Any, ...]:
    """(ids, log-probs, counts `[N, n]`, log z, log mass outside, log-prob of `next_N` `[N]`) from logits in any dtype.

    Ids are distinct, likeliest first; after the last one the first is repeated with log-prob −inf and count 0.
    """
    import torch

    logits = logits_NV.float()
    top_N1 = logits.amax(dim=1, keepdim=True)
    mass_NV = _padded_exp(logits - top_N1)
    total_N1 = mass_NV.sum(dim=1, keepdim=True, dtype=torch.float64)
    proposal_NV = mass_NV if temperature == 1.0 else _padded_exp((logits - top_N1) * temperature)
    drawn_Nn, proposal_total_N1 = _inverse(proposal_NV, uniforms_Nn)
    ids, counts = _distinct(drawn_Nn)
    lse_N1 = top_N1.double() + total_N1.log()
    logp = (logits.gather(1, ids).double() - lse_N1).masked_fill_(counts == 0, -torch.inf)
    logp, order = logp.sort(dim=1, descending=True, stable=True)
    ids, counts = ids.gather(1, order), counts.gather(1, order)
    ids = ids.where(counts > 0, ids[:, :1])
    log_z_N = (proposal_total_N1.log() - temperature * (lse_N1 - top_N1))[:, 0]
    outside_N = (1.0 - logp.exp().sum(dim=1)).clamp_min(LEAST_TAIL).log()
    lp_next_N = logits.gather(1, next_N[:, None])[:, 0] - lse_N1[:, 0]
    return ids.int(), logp.float(), counts.to(torch.uint8), log_z_N.float(), outside_N.float(), lp_next_N.float()


def draw_chunks(
    chunks: Chunks, tokens_BT: NDArray[Any], uniforms_BTn: NDArray[np.float64], sampling: Sampling
) -> Drawn:
    """What was drawn at every position of rows of tokens, from chunks of their logits."""
    import torch

    rows, length = tokens_BT.shape
    next_N = torch.from_numpy(np.roll(tokens_BT, -1, axis=1).astype(np.int64).reshape(-1))
    uniforms_Nn = torch.from_numpy(uniforms_BTn.reshape(rows * length, -1))
    parts = []
    with torch.inference_mode():
        for start, logits_CV in chunks:
            on_cpu = logits_CV.device.type == "cpu"
            step = CPU_TOKENS if on_cpu else max(len(logits_CV), 1)
            for at in range(0, len(logits_CV), step):
                logits = logits_CV[at : at + step]
                here = slice(start + at, start + at + len(logits))
                uniforms, following = uniforms_Nn[here].to(logits.device), next_N[here].to(logits.device)
                drawn = draw(logits, uniforms, following, sampling.temperature)
                parts.append([column.cpu() for column in drawn])
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    ids, logp, counts, log_z, tail, lp_next = (column.reshape(rows, length, *column.shape[1:]) for column in columns)
    lp_next[:, -1] = np.nan
    return Drawn(ids, logp, tail, lp_next, counts, log_z)


def _padded_exp(values_NV: Any) -> Any:
    """exp, with zeros after the last id up to a whole number of groups; overwrites nothing."""
    import torch

    tokens, vocab = values_NV.shape
    exp_NV = values_NV.new_zeros(tokens, -(-vocab // GROUP) * GROUP)
    torch.exp(values_NV, out=exp_NV[:, :vocab])
    return exp_NV


def _inverse(mass_NV: Any, uniforms_Nn: Any) -> tuple[Any, Any]:
    """The ids at the given shares of the cumulative mass, ascending, and the whole mass `[N, 1]`; in float64.

    An id of no mass is never found.
    """

    mass_NGS = mass_NV.unflatten(1, (-1, GROUP))
    mass_NG = mass_NGS.sum(dim=2).double()
    below_NG = mass_NG.cumsum(dim=1)
    total_N1 = below_NG[:, -1:].contiguous()
    group, into = _search(below_NG, uniforms_Nn * total_N1)
    share = (into / mass_NG.gather(1, group)).clamp_max(1.0)
    inner_NnS = mass_NGS.gather(1, group[..., None].expand(-1, -1, GROUP)).double().cumsum(dim=2)
    within, _ = _search(inner_NnS, share[..., None] * inner_NnS[..., -1:])
    return group * GROUP + within[..., 0], total_N1


def _search(below: Any, wanted: Any) -> tuple[Any, Any]:
    """For each wanted amount the first place whose cumulative mass exceeds it, and how far into that place it lies."""
    import torch

    last = below[..., -1:]
    wanted = torch.minimum(wanted, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(below, wanted.contiguous(), right=True)
    before = below.gather(-1, (place - 1).clamp_min(0)).where(place > 0, 0.0)
    return place, (wanted - before).clamp_min(0.0)


def _distinct(drawn_Nn: Any) -> tuple[Any, Any]:
    """Ascending draws → the distinct ids, ascending, and how often each came; 0 and id 0 after the last."""
    import torch

    fresh_Nn = torch.ones_like(drawn_Nn, dtype=torch.bool)
    fresh_Nn[:, 1:] = drawn_Nn[:, 1:] != drawn_Nn[:, :-1]
    place_Nn = fresh_Nn.cumsum(dim=1) - 1
    counts = torch.zeros_like(drawn_Nn).scatter_add_(1, place_Nn, torch.ones_like(drawn_Nn))
    return torch.zeros_like(drawn_Nn).scatter_(1, place_Nn, drawn_Nn), counts
