"""What the evaluate stage does: assemble the ladder, score it, time it, hold the gates against it, write it down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmdistill.evaluation import gates, ladder, quality, record, speed
from lmdistill.evaluation.heldout import HeldOut, read_heldout
from lmdistill.evaluation.pairs import compare
from lmdistill.evaluation.runtimes import RuntimeOptions
from lmdistill.evaluation.scorer import RowSums
from lmdistill.pipeline.stage import Artefact, StageContext

if TYPE_CHECKING:
    from lmdistill.stages.evaluate import EvaluateConfig


def evaluate(ctx: StageContext[EvaluateConfig]) -> dict[str, Any]:
    """Measure everything into `ctx.out`/evaluation.json; returns the deterministic half."""
    config, models = ctx.config, ctx.inputs.get("models", ())
    subjects = ladder.assemble(ctx.need_teacher(), models, ctx.inputs.get("deployments", ()))
    heldout = read_heldout(ctx.one("corpus").out, config.split, config.tokens)
    ctx.progress.note(f"{len(subjects)} rows on {heldout.predictions:,} predictions of '{config.split}'")
    options = RuntimeOptions(heldout.sequence_length, ctx.runtime.threads, ctx.runtime.resolve_device())
    sums = quality.score_all(
        quality.QualityRun(subjects, heldout, ctx.work / "scores", "kl" in config.metrics, options, ctx.progress)
    )
    figures = _quality(subjects, models, heldout, sums)
    timed = _speed(ctx, subjects)
    rows = record.with_rounds(record.measured_ladder(figures["ladder"], timed["rows"]), timed["rows"])
    signals = next(iter(ctx.inputs.get("signals", ())), None)
    record.write(
        ctx.out,
        {
            "name": ctx.name,
            "suite": config.suite,
            "quality": figures,
            "speed": timed,
            "gates": [result.to_json() for result in gates.check(config.gates, rows)],
            "curves": record.curves(models),
            "signals": record.cache_figures(signals),
            "environment": record.environment(timed["threads"]),
        },
    )
    return {
        "tokens": heldout.predictions,
        "nll": {row["name"]: row["nll"] for row in figures["ladder"]},
        "kl_to_parent": {row["name"]: row["kl_to_parent"] for row in figures["ladder"]},
    }


def _quality(
    subjects: Sequence[ladder.Subject], models: Sequence[Artefact], heldout: HeldOut, sums: dict[str, RowSums]
) -> dict[str, Any]:
    """What was scored, each row's figures, and students against baselines on the same predictions."""
    return {
        "split": heldout.split,
        "rows": heldout.rows,
        "sequence_length": heldout.sequence_length,
        "predictions": heldout.predictions,
        "bytes": int(heldout.bytes_R.sum()),
        "ladder": quality.describe(subjects, sums),
        "pairs": compare(models, sums),
    }


def timed_targets(subjects: Sequence[ladder.Subject], checkpoints: bool) -> list[speed.SpeedTarget]:
    """Files, and checkpoints where asked, those of one format together: what is compared runs close in time."""
    return [
        speed.SpeedTarget(subject.name, subject.runtime, subject.path)
        for subject in sorted(subjects, key=lambda subject: subject.format)
        if subject.role == "file" or checkpoints
    ]


def _speed(ctx: StageContext[EvaluateConfig], subjects: Sequence[ladder.Subject]) -> dict[str, Any]:
    """Times of every file, and of checkpoints where the recipe asks; no rows where speed is not wanted."""
    from lmdistill.deployment.llama_cpp_runtime import default_threads

    config, threads = ctx.config, ctx.runtime.threads or default_threads()
    targets = timed_targets(subjects, config.checkpoint_speed)
    sizes = config.speed.model_dump()
    if "speed" not in config.metrics or not targets:
        return {"threads": threads, **sizes, "rows": {}}
    ctx.progress.note(f"timing {len(targets)} models, {sizes['repeats']} interleaved rounds, {threads} threads")
    plan = speed.SpeedPlan(**sizes, threads=threads, device=ctx.runtime.resolve_device())
    total = plan.repeats + 1
    rows = speed.measure(targets, plan, ctx.work / "speed", lambda done: ctx.progress.update(done, total, "rounds"))
    return {"threads": threads, **sizes, "rows": rows}
