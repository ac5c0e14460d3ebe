"""From logits to top-K log-probs and the tail's log mass, exact in float32, in about one pass over the vocabulary.

Axes: N tokens, V vocabulary, K entries of a token, G groups of V/S ids, S = 16 ids of a group.
"""

from __future__ import annotations

from typing import Any

GROUP = 16  # ids that share one maximum
LOG2_E = 1.4426950408889634  # torch's exp2 takes a third of its exp's time on a CPU, and is as exact
CPU_TOKENS = 32  # float32 logits of so many tokens stay in the processor's cache
CPU_CHUNK = 128  # tokens whose top K is sought at once: its many small steps cost as much for a few
LEAST_TAIL = 1.2e-38  # a tail below e^-87 of the K-th entry counts as e^-87: finite, and nothing to a loss


def top_k(logits_NV: Any, k: int) -> tuple[Any, Any]:
    """The K largest logits, descending, in float32, with their ids; of equals within the K the lower id first.

    A K-th largest entry lies in one of the K groups with the largest maxima, so only those groups are searched.
    """
    import torch

    vocab = logits_NV.shape[1]
    groups = vocab // GROUP
    if k * 4 > groups:
        values_NK, ids_NK = logits_NV.float().topk(k, dim=1)
    else:
        whole = groups * GROUP  # group g holds the ids g, g + G, g + 2G, …: its maximum is a sum of long vectors
        grouped_NSG = logits_NV[:, :whole].unflatten(1, (GROUP, groups))
        best_NK = grouped_NSG.amax(dim=1).topk(k, dim=1, sorted=False).indices
        found = grouped_NSG.gather(2, best_NK[:, None].expand(-1, GROUP, -1)).flatten(1)
        candidates = torch.cat([found, logits_NV[:, whole:]], dim=1).float()
        values_NK, at_NK = candidates.topk(k, dim=1)
        inside = at_NK.clamp(max=k * GROUP - 1)
        in_group = inside // k * groups + best_NK.gather(1, inside % k)
        ids_NK = torch.where(at_NK < k * GROUP, in_group, at_NK - k * GROUP + whole)
    by_id = ids_NK.argsort(dim=1)
    values_NK, order = values_NK.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values_NK, ids_NK.gather(1, by_id).gather(1, order)


def tail_logsumexp(logits_NV: Any, values_NK: Any, ids_NK: Any, scratch_NV: Any) -> Any:
    """logsumexp over the ids outside the K, `[N]`: summed over the rest itself, never as log(1 − head).

    It works in `scratch_NV`, float32, which is written over.
    """
    import torch

    if ids_NK.shape[1] == logits_NV.shape[1]:
        return torch.full_like(values_NK[:, 0], float("-inf"))
    lowest_N1 = values_NK[:, -1:]
    rest_NV = scratch_NV.copy_(logits_NV)
    rest_NV.scatter_(1, ids_NK, float("-inf")).sub_(lowest_N1).mul_(LOG2_E).exp2_()
    return rest_NV.sum(dim=1).clamp_min(LEAST_TAIL).log() + lowest_N1[:, 0]


def reduce_logits(logits_NV: Any, next_N: Any, k: int) -> tuple[Any, Any, Any, Any]:
    """(ids [N, K], log-probs [N, K], tail [N], log-prob of `next_N` [N]) of logits in any dtype."""
    import torch

    on_cpu, everything = logits_NV.device.type == "cpu", max(len(logits_NV), 1)
    chunk, few = (CPU_CHUNK, CPU_TOKENS) if on_cpu else (everything, everything)
    # Fresh memory for every few tokens would be cleared by the system each time, which takes a third of the whole.
    scratch_NV = logits_NV.new_empty((min(few, len(logits_NV)), logits_NV.shape[1]), dtype=torch.float32)
    parts = []
    for start in range(0, len(logits_NV), chunk):
        logits = logits_NV[start : start + chunk]
        values_NK, ids_NK = top_k(logits, k)
        columns = zip(logits.split(few), values_NK.split(few), ids_NK.split(few), strict=True)
        tail_N = torch.cat([tail_logsumexp(*some, scratch_NV[: len(some[0])]) for some in columns])
        total_N = torch.logaddexp(values_NK.logsumexp(dim=1), tail_N)
        next_logit_N = logits.gather(1, next_N[start : start + chunk, None])[:, 0].float()
        parts.append((ids_NK.int(), values_NK - total_N[:, None], tail_N - total_N, next_logit_N - total_N))
    ids, logp, tail, lp_next = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, logp, tail, lp_next
