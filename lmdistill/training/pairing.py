"""Which loss learns from which teacher cache."""

from __future__ import annotations

from lmdistill.errors import PreflightError
from lmdistill.losses import registry


def check_pair(loss: str, sampled: bool, cache: str) -> None:
    """Raise PreflightError where the loss cannot learn from a cache of drawn ids (`sampled`) or of the top K.

    `cache` names it in the message.
    """
    wanted = registry.signals_of(loss)
    if wanted == "top_k" and sampled:
        raise PreflightError(
            f"loss '{loss}' learns from the teacher's top K, and {cache} holds ids drawn from the teacher",
            why="drawn ids are no top K: what is not among them may be likely",
            fix="set `loss: sampled_kd` in distill, or `variant: mmap` or `compact` in teach",
        )
    if wanted == "sampled" and not sampled:
        raise PreflightError(
            f"loss '{loss}' learns from ids drawn from the teacher, and {cache} holds its top K",
            why="entries of a top K have no importance weights: the estimate would be biased",
            fix="set `variant: sampled` in teach, or `loss: decoupled_topk` in distill",
        )
