"""A model trained on its grid is not reported alone: its parent's quantisations of the same type stand beside it."""

from __future__ import annotations

from collections.abc import Iterable

from lmdistill.errors import PreflightError
from lmdistill.pipeline.stage import Planned
from lmdistill.quantization.planned import in_full_precision, lies_on


def missing_ptq(stage: str, exports: Iterable[Planned]) -> Iterable[PreflightError]:
    """What `exports` lack: each trained file's parent quantised to the same format, and that with an imatrix.

    The parent is the model in full precision, whatever was trained on the grid since.
    """
    exports = list(exports)
    for export in exports:
        for model in export.inputs.get("model", ()):
            parent = in_full_precision(model)
            if parent is None:
                continue
            for format_name in _packed(export, model):
                for imatrix in (False, True):
                    if not any(_is_ptq(one, parent, format_name, imatrix) for one in exports):
                        yield _lacks(stage, export.name, parent.name, format_name, imatrix)


def _packed(export: Planned, model: Planned) -> list[str]:
    """The formats of an export that hold the points that a model was trained to."""
    from lmdistill.deployment.targets import targets

    preset = lies_on(model)
    packed = {name for target in targets().values() for name in target.packed_formats(model, preset or "")}
    return [name for name in getattr(export.config, "formats", ()) if name in packed]


def _is_ptq(export: Planned, parent: Planned, format_name: str, imatrix: bool) -> bool:
    """Whether an export quantises `parent` to that format, with or without an importance matrix."""
    of = {model.fingerprint for model in export.inputs.get("model", ())}
    has_matrix = bool(getattr(export.config, "imatrix_tokens", None))
    return parent.fingerprint in of and format_name in getattr(export.config, "formats", ()) and has_matrix == imatrix


def _lacks(stage: str, export: str, parent: str, format_name: str, imatrix: bool) -> PreflightError:
    how = " with an importance matrix" if imatrix else ""
    matrix = ", `imatrix_tokens: 16384`" if imatrix else ""
    return PreflightError(
        f"stage '{stage}': nothing shows what training on the grid of '{export}' gained",
        why=f"'{parent}' quantised to {format_name}{how} is not evaluated beside it",
        fix=f"add a stage `export` with `from: [{parent}, corpus]`, `formats: [{format_name}]`{matrix}",
    )
