"""How each architecture's checkpoint becomes a GGUF file: one file a family, one decorated class an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdistill.deployment.architectures import lfm2, llama  # noqa: F401  (importing a family registers it)
from lmdistill.deployment.architectures.base import ARCHITECTURES, Architecture
from lmdistill.errors import PreflightError, nearest

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "check_model_type"]


def check_model_type(model_type: str) -> None:
    """Raise PreflightError with the nearest name where lmdistill cannot write this architecture as GGUF."""
    if model_type not in ARCHITECTURES:
        raise PreflightError(
            f"cannot write a GGUF of architecture '{model_type}'{nearest(model_type, ARCHITECTURES)}",
            why=f"lmdistill writes {', '.join(sorted(ARCHITECTURES))}",
            fix="choose a student of one of these architectures, or drop the export stage",
        )


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The writer for a checkpoint's config.json; raises PreflightError where lmdistill cannot write it as GGUF."""
    model_type = str(config.get("model_type", ""))
    check_model_type(model_type)
    found = ARCHITECTURES[model_type](config)
    if refusals := found.refusals():
        raise PreflightError(
            f"cannot write this {model_type} model as GGUF",
            why="; ".join(refusals),
            fix="use a model without this: llama.cpp would compute something else",
        )
    return found
