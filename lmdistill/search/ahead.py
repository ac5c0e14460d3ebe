"""What a search will choose at most, for the estimates of the stages after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.space import Space


def largest(config: DeviceSearchConfig, teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys of `student` that describe the largest student of a space; None where it has none."""
    space = Space(config.space, teacher, config.timing.format)
    shapes = space.shapes()
    if not shapes:
        return None
    most = max(map(space.evenly, shapes), key=lambda candidate: candidate.parameters)
    return {
        "init": "grow",
        "architecture": most.architecture,
        "layers": most.depth,
        "attention_layers": most.attention_layers,
        "hidden_size": most.hidden_size,
        "intermediate_size": most.intermediate_size,
        "heads": most.heads,
        "kv_heads": most.kv_heads,
        "kernel": most.kernel,
    }
