"""The keys of `teach` that say how ids are drawn: with which others they go, and what they mean where they are null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAMPLED = "sampled"  # the variant that holds what was drawn
KEYS = ("draws", "proposal_temperature", "draw_seed")
DRAWS = 24
TOP_K_KEYS = ("k", "top_p", "hidden_layers")  # of caches of the teacher's top K


def stray_keys(config: Any, fields: Mapping[str, Any]) -> str:
    """What is wrong where a key of one kind of cache is set for the other; nothing where all is well."""
    if config.variant != SAMPLED:
        stray = [name for name in KEYS if getattr(config, name) is not None]
        return f"{', '.join(stray)}: goes with `variant: {SAMPLED}`, not {config.variant}" if stray else ""
    stray = [name for name in TOP_K_KEYS if getattr(config, name) != fields[name].default]
    why = "all that is drawn is kept, up to `draws` ids a token, and nothing else"
    return f"{', '.join(stray)}: does not go with `variant: {SAMPLED}`: {why}" if stray else ""


def draw_keys(config: Any) -> tuple[int, float, int]:
    """Draws, the proposal's temperature and the seed, as set or by default."""
    temperature = config.proposal_temperature
    return config.draws or DRAWS, 1.0 if temperature is None else temperature, config.draw_seed or 0
