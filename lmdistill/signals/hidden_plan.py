"""Hidden states as a recipe asks for them: checked against the teacher's config.json, and what they will cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdistill.errors import PreflightError
from lmdistill.signals.background import DEPTH
from lmdistill.signals.hidden import HiddenLayout
from lmdistill.teachers.registry import ENGINES

FLOAT32 = 4  # bytes


def check_hidden(engine: str, members: int) -> None:
    """Raise PreflightError where the engine cannot give hidden states, or several teachers have no common ones."""
    if not ENGINES[engine].hidden:
        able = sorted(name for name, entry in ENGINES.items() if entry.hidden)
        raise PreflightError(
            f"engine '{engine}' cannot give hidden states",
            fix=f"drop `hidden_layers`, or use one of: {', '.join(able)}",
        )
    if members > 1:
        raise PreflightError(
            "an ensemble has no hidden states",
            why="each teacher's are in a space of their own: their mean is nobody's",
            fix="drop `hidden_layers` or `ensemble`",
        )


def hidden_layout(layers: Sequence[int], dtype: str, model: Path) -> HiddenLayout | None:
    """What will be stored of the teacher in `model`; None where no layer is asked for.

    Layers count from 0, the embeddings, to N, the last block's output after the final norm; negative ones from the
    end. Raises PreflightError for layers that the teacher has not, or named twice.
    """
    if not layers:
        return None
    blocks, width = shape_of(model)
    unknown = [layer for layer in layers if not -blocks - 1 <= layer <= blocks]
    chosen = tuple(layer % (blocks + 1) for layer in layers)
    if unknown or len(set(chosen)) < len(chosen):
        raise PreflightError(
            f"hidden_layers {list(layers)} cannot be kept",
            why=f"this teacher's hidden states are 0 to {blocks}, or −1 to −{blocks + 1} from the end; each once",
            fix="correct `hidden_layers`",
        )
    return HiddenLayout(chosen, width, dtype)


def shape_of(model: Path) -> tuple[int, int]:
    """(blocks, hidden width D) from a model folder's config.json; PreflightError where it does not say."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    try:
        return int(config["num_hidden_layers"]), int(config["hidden_size"])
    except KeyError as error:
        raise PreflightError(
            f"{model}/config.json does not say {error}",
            why="the size of its hidden states is not known",
            fix="drop `hidden_layers`",
        ) from error


def hidden_memory(layout: HiddenLayout, model: Path, batch_tokens: int) -> int:
    """Bytes held at once: every layer's states of a batch, and what of the chosen ones waits for the disk."""
    blocks, width = shape_of(model)
    return batch_tokens * width * FLOAT32 * (blocks + 1 + len(layout.layers) * (DEPTH + 2))
