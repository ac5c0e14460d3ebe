"""What a search will choose at most, for the estimates of the stages after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.space import Space
from lmdistill.search.space_problems import NEEDED


def largest(config: DeviceSearchConfig, teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of the largest student of a space; None where the space, or the teacher, has none."""
    if any(not teacher.get(key) for key in NEEDED):
        return None  # the search's own preflight says so
    space = Space(config.space, teacher, config.timing.format)
    candidates = map(space.evenly, space.shapes())
    most = max(candidates, key=lambda candidate: candidate.parameters, default=None)
    return None if most is None else most.shape_config()
