"""A model trained on its grid is not reported alone: its parent's quantisations of the same type stand beside it."""

from __future__ import annotations

from collections.abc import Iterable

from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import Planned
from lmdistill.quantization.plan import PRESETS
from lmdistill.quantization.planned import in_full_precision, lies_on


def missing_ptq(stage: str, exports: Iterable[Planned]) -> Iterable[PreflightError]:
    """What `exports` lack: llama.cpp's own quantisation of each trained file's parent, and that with an imatrix.

    The parent is the model in full precision, whatever was trained on the grid since.
    """
    exports = list(exports)
    for export in exports:
        for model in export.inputs.get("model", ()):
            preset = lies_on(model)
            if preset not in PRESETS or preset not in getattr(export.config, "formats", ()):
                continue
            parent = in_full_precision(model)
            if parent is not None:
                for imatrix in (False, True):
                    if not any(_is_ptq(one, parent, preset, imatrix) for one in exports):
                        yield _lacks(stage, export.name, parent.name, preset, imatrix)


def _is_ptq(export: Planned, parent: Planned, preset: str, imatrix: bool) -> bool:
    """Whether an export quantises `parent` to that file type, with or without an importance matrix."""
    of = {model.fingerprint for model in export.inputs.get("model", ())}
    has_matrix = bool(getattr(export.config, "imatrix_tokens", None))
    return parent.fingerprint in of and preset in getattr(export.config, "formats", ()) and has_matrix == imatrix


def _lacks(stage: str, export: str, parent: str, preset: str, imatrix: bool) -> PreflightError:
    how = " with an importance matrix" if imatrix else ""
    matrix = ", `imatrix_tokens: 16384`" if imatrix else ""
    return PreflightError(
        f"stage '{stage}': nothing shows what training on the grid of '{export}' gained",
        why=f"'{parent}' quantised to {preset} by llama.cpp{how} is not evaluated beside it",
        fix=f"add a stage `export` with `from: [{parent}, corpus]`, `formats: [{preset}]`{matrix}",
    )
