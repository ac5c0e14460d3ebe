"""What can be known of quantized distillation before it runs: grid, widths, tied head, whether weights are there."""

from __future__ import annotations

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import PreflightContext
from lmdistill.training.config import DistillConfig


def check_grids(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """What `quantize` asks that the student, as far as it is known, cannot do."""
    from lmdistill.deployment.planned import config_ahead
    from lmdistill.quantization.planned import lies_on
    from lmdistill.quantization.wanted import wanted
    from lmdistill.training.on_grids import refuse_converted, refuse_lost_scales

    keys = ctx.config.quantize
    if not ctx.inputs.get("student"):
        return []
    student = ctx.one("student")
    try:
        if student.artefact is not None:
            refuse_converted(student.artefact.model().path, ctx.config)
        elif ctx.config.lora is not None and lies_on(student) is not None:
            raise PreflightError(
                f"stage '{ctx.name}': its student will lie on '{lies_on(student)}', and a merged adapter would not",
                fix="train its weights (drop `lora`), or name the model in full precision in `from`",
            )
        elif keys is not None and (preset := lies_on(student)) not in (None, keys.grid):
            raise PreflightError(
                f"stage '{ctx.name}': its student will be converted: stage '{student.name}' leaves it on '{preset}'",
                why=f"`quantize.grid` is {keys.grid}, and points of one grid quantised anew are worse than either",
                fix=f"name the model in full precision in `from`, or set `quantize.grid: {preset}`",
            )
        if keys is not None and lies_on(student) is not None:
            refuse_lost_scales(keys, f"stage '{ctx.name}': its student")
        if keys is not None and (config := config_ahead(ctx, "student")) is not None:
            wanted(keys, config)
    except LmdistillError as error:
        return [error]
    return []
