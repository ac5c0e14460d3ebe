"""export: a model as GGUF files for llama.cpp and programs for ExecuTorch, each proven against its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

from pydantic import Field, field_validator

from lmdistill.deployment.targets import Target, by_target, exported_format, format_of
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import AddedKey, Estimate, Input, PreflightContext, Stage, StageConfig, StageContext


class ExportConfig(StageConfig):
    """Keys of `export`."""

    formats: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("f32", "f16", "q8_0", "q4_0", "q4_k_m"),
        description="GGUF formats by llama.cpp's names; for ExecuTorch pte_f32, pte_8da4w, and pte_8da4w_all with "
        "embeddings and head on the grid too",
    )
    golden_conversations: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=64, description="conversations on which token ids and chat template must be the checkpoint's"
    )
    parity_tokens: Annotated[int, Field(ge=16)] = Field(
        default=1024, description="tokens of held-out text on which each file's predictions are compared"
    )
    max_kl_f32: Annotated[float, Field(gt=0)] = Field(
        default=1e-6, description="highest mean KL of f32 and pte_f32, nats a token"
    )
    max_kl_f16: Annotated[float, Field(gt=0)] = Field(default=2e-5, description="highest mean KL of f16, nats a token")
    min_top1: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.998, description="lowest top-1 agreement of f32, pte_f32 and f16, ties within 0.03 nats aside"
    )
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="highest mean KL of the other formats, nats a token; null: recorded, not judged"
    )

    imatrix_tokens: Annotated[int | None, AddedKey(), Field(ge=1)] = Field(
        default=None, description="tokens of training text for an importance matrix; null: quantised without one"
    )
    context: Annotated[int | None, AddedKey(), Field(ge=16)] = Field(
        default=None, description="`pte_…`: positions the caches hold; null: what the model knows, at most 2,048"
    )
    max_abs_f32: Annotated[float, AddedKey(), Field(gt=0)] = Field(
        default=1e-4, description="`pte_f32`: farthest that a logit may be from the checkpoint's"
    )
    min_delegated: Annotated[float, AddedKey(), Field(ge=0, le=1)] = Field(
        default=0.95, description="`pte_…`: least share of the compute that XNNPACK must take"
    )

    @field_validator("formats")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Every name in lower case and once."""
        return tuple(dict.fromkeys(exported_format(name) for name in names))


class ExportStage(Stage[ExportConfig]):
    """Writes a checkpoint's files and proves every one."""

    name = "export"
    version = 2
    Config = ExportConfig
    inputs = (Input("model", ("model", "student")), Input("corpus", ("corpus",), optional=True))
    output = "deployment"
    tools = ("gguf", "llama-cpp-python", "torch", "transformers")

    def tools_used(self, config: ExportConfig) -> tuple[str, ...]:
        """Those of the targets that are written for."""
        return tuple(dict.fromkeys(tool for target in by_target(config.formats) for tool in target.tools))

    def preflight(self, ctx: PreflightContext[ExportConfig]) -> list[LmdistillError]:
        """Packages, the architecture and the tokenizer, as far as they are known."""
        missing = [problem for target in by_target(ctx.config.formats) if (problem := target.missing())]
        if missing:
            return [named_problem(ctx.name, problem) for problem in missing]
        problems: list[LmdistillError] = []
        for check in _checks(ctx):
            try:
                check()
            except LmdistillError as error:
                problems.append(error)
        return problems

    def estimate(self, ctx: PreflightContext[ExportConfig]) -> Estimate:
        """Time and disk of the files and of the reference; says which formats will not be what they say."""
        from lmdistill.deployment.architectures import ARCHITECTURES
        from lmdistill.deployment.formats import weight_count
        from lmdistill.deployment.planned import config_ahead

        config = config_ahead(ctx, "model")
        if config is None or config.get("model_type") not in ARCHITECTURES:
            return Estimate()  # not known yet, or preflight says why
        try:
            costs = [target.cost(config, names) for target, names in by_target(ctx.config.formats).items()]
        except PreflightError:
            return Estimate()  # preflight says why
        weights = weight_count(ARCHITECTURES[config["model_type"]](config))
        tokens = ctx.config.parity_tokens * (len(ctx.config.formats) + 1)
        seconds = sum(cost[0] for cost in costs) + weights * 2 * tokens / 2e10
        disk = sum(cost[1] for cost in costs) + 4 * ctx.config.parity_tokens * int(config["vocab_size"])
        return Estimate(seconds, disk, 5 * weights, "; ".join(cost[2] for cost in costs if cost[2]))

    def run(self, ctx: StageContext[ExportConfig]) -> dict[str, Any]:
        """Write, quantise, measure."""
        from lmdistill.corpus.format import CorpusReader
        from lmdistill.deployment.export import Export

        corpora = ctx.inputs.get("corpus", ())
        export = Export(
            model=ctx.one("model").model(),
            name=ctx.name,
            formats=ctx.config.formats,
            conversations=ctx.config.golden_conversations,
            parity_tokens=ctx.config.parity_tokens,
            out=ctx.out,
            work=ctx.work,
            corpus=CorpusReader(corpora[0].out) if corpora else None,
            threads=ctx.runtime.threads,
            imatrix_tokens=ctx.config.imatrix_tokens,
            context=ctx.config.context,
            min_delegated=ctx.config.min_delegated,
        )
        record = export.run(ctx.progress)
        shown = ("bytes", "bits_per_weight", "fallback_share")
        return {
            "params": record["params"],
            "files": {e["format"]: {key: e[key] for key in shown} | e["parity"] for e in record["files"]},
        }

    def verify(self, ctx: StageContext[ExportConfig], metrics: dict[str, Any]) -> None:
        """Every file is the one measured and within its limits."""
        from lmdistill.deployment.export import Limits, verify_deployment

        config = ctx.config
        limits = Limits(config.max_kl_f32, config.max_kl_f16, config.min_top1, config.max_kl, config.max_abs_f32)
        verify_deployment(ctx.out, limits, ctx.one("model").model().path)


def named_problem(stage: str, problem: LmdistillError) -> LmdistillError:
    """A target's refusal with the stage's name in front."""
    return PreflightError(f"stage '{stage}': {problem.what}", why=problem.why, fix=problem.fix)


def _second_grid(ctx: PreflightContext[ExportConfig]) -> None:
    """Raise PreflightError where weights trained on one grid would be put on another."""
    from lmdistill.quantization.planned import lies_on

    model = ctx.one("model")
    preset = lies_on(model)
    if preset is None:
        return
    for target, names in by_target(ctx.config.formats).items():
        packed, file = target.packed_formats(model, preset), target.suffix.removeprefix(".").upper()
        if not packed and any(format_of(name).quantized for name in names):
            raise PreflightError(
                f"stage '{ctx.name}': a {file} file cannot hold a model trained on grid '{preset}'",
                fix="export to the runtime that grid is for, or train on a grid that this one has",
            )
        if other := [name for name in names if format_of(name).quantized and name not in packed]:
            beside = ", ".join(name for name in target.formats if not format_of(name).quantized)
            raise PreflightError(
                f"stage '{ctx.name}': `formats: {other[0]}` would quantise a model a second time",
                why=f"its weights were trained on '{preset}' and lie there",
                fix=f"set `formats: [{', '.join(packed)}]` ({beside} may stand beside it), or export the model before "
                "`quantize`",
            )


def _needs_text(ctx: PreflightContext[ExportConfig]) -> None:
    """Raise PreflightError where an importance matrix is asked for without text."""
    if ctx.config.imatrix_tokens and not ctx.inputs.get("corpus"):
        raise PreflightError(
            f"stage '{ctx.name}': `imatrix_tokens` needs a corpus", fix="name the corpus stage in `from` too"
        )


def _converted(ctx: PreflightContext[ExportConfig]) -> None:
    """Raise PreflightError, with the stage's name, where the checkpoint holds another program's packed integers."""
    from lmdistill.checkpoints import refuse_packed

    artefact = ctx.one("model").artefact
    if artefact is None:
        return
    prepared = "export the prepared model: one that `distill` with `quantize:` leaves, or one in full precision"
    try:
        refuse_packed(artefact.model().path, fix=prepared)
    except PreflightError as error:
        raise named_problem(ctx.name, error) from error


def _of_model(ctx: PreflightContext[ExportConfig], target: Target) -> None:
    """Raise PreflightError, with the stage's name, where a target cannot have this model."""
    try:
        target.check_model(ctx.one("model"))
    except LmdistillError as error:
        raise named_problem(ctx.name, error) from error


def _checks(ctx: PreflightContext[ExportConfig]) -> Iterator[Any]:
    """What can be tried before anything runs; each raises where the export would fail."""
    from lmdistill.deployment.planned import config_ahead

    targets, config = by_target(ctx.config.formats), config_ahead(ctx, "model")
    yield lambda: _needs_text(ctx)
    yield lambda: _converted(ctx)
    for target in targets:
        yield target.check_runtime
        yield partial(_of_model, ctx, target)
    yield lambda: _second_grid(ctx)
    for target, names in targets.items():
        if config is not None:
            yield partial(target.check_config, config, names, ctx.config.context)
        if ctx.teacher is not None and (ctx.teacher.path / "tokenizer.json").is_file():
            yield partial(target.check_tokenizer, ctx.teacher.path)
