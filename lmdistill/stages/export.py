"""export: a model as GGUF files for llama.cpp, each proven against the checkpoint it comes from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator

from lmdistill.deployment.formats import FORMATS, fallback_share, known_format
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import AddedKey, Estimate, Input, PreflightContext, Stage, StageConfig, StageContext

NOTED_SHARE = 0.1  # of the weights: above it the plan says that a format is not what its name says


class ExportConfig(StageConfig):
    """Keys of `export`."""

    formats: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("f32", "f16", "q8_0", "q4_0", "q4_k_m"), description="GGUF formats to write, by llama.cpp's names"
    )
    golden_conversations: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=64, description="conversations on which token ids and chat template must be the checkpoint's"
    )
    parity_tokens: Annotated[int, Field(ge=16)] = Field(
        default=1024, description="tokens of held-out text on which each file's predictions are compared"
    )
    max_kl_f32: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="highest mean KL of f32, nats a token")
    max_kl_f16: Annotated[float, Field(gt=0)] = Field(default=2e-5, description="highest mean KL of f16, nats a token")
    min_top1: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.998, description="lowest top-1 agreement of f32 and f16, ties within 0.03 nats aside"
    )
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="highest mean KL of the other formats, nats a token; null: recorded, not judged"
    )

    imatrix_tokens: Annotated[int | None, AddedKey(), Field(ge=1)] = Field(
        default=None, description="tokens of training text for an importance matrix; null: quantised without one"
    )

    @field_validator("formats")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Every name in lower case and once."""
        return tuple(dict.fromkeys(known_format(name) for name in names))


class ExportStage(Stage[ExportConfig]):
    """Writes a checkpoint as GGUF, lets llama.cpp quantise it, and proves every file."""

    name = "export"
    version = 1
    Config = ExportConfig
    inputs = (Input("model", ("model", "student")), Input("corpus", ("corpus",), optional=True))
    output = "deployment"
    tools = ("gguf", "llama-cpp-python", "torch", "transformers")

    def preflight(self, ctx: PreflightContext[ExportConfig]) -> list[LmdistillError]:
        """Packages, the architecture and the tokenizer, as far as they are known."""
        missing = [
            name for name in ("gguf", "llama_cpp", "torch", "transformers") if not importlib.util.find_spec(name)
        ]
        if missing:
            what = f"stage '{ctx.name}' needs {', '.join(missing)}"
            return [PreflightError(what, why="not installed", fix="pip install 'lmdistill[all]'")]
        problems: list[LmdistillError] = []
        for check in _checks(ctx):
            try:
                check()
            except LmdistillError as error:
                problems.append(error)
        return problems

    def estimate(self, ctx: PreflightContext[ExportConfig]) -> Estimate:
        """Disk for the files, their 32-bit base and the reference; says which formats will not be what they say."""
        from lmdistill.deployment.planned import config_ahead

        config = config_ahead(ctx, "model")
        if config is None:
            return Estimate()
        from lmdistill.deployment.architectures import architecture_of
        from lmdistill.deployment.formats import weight_count

        try:
            architecture = architecture_of(config)
        except PreflightError:
            return Estimate()  # preflight says why
        formats = [FORMATS[name] for name in ctx.config.formats]
        weights = weight_count(architecture)
        reference = 4 * ctx.config.parity_tokens * architecture.vocab_size
        disk = int(sum(format_.bits for format_ in {*formats, FORMATS["f32"]}) / 8 * weights) + reference
        tokens = ctx.config.parity_tokens * (len(formats) + 1)
        shares = {format_.suffix: fallback_share(format_, architecture) for format_ in formats}
        wide = [f"{name} {share:.0%}" for name, share in shares.items() if share > NOTED_SHARE]
        note = f"weights in a larger type than the format's, for their widths: {', '.join(wide)}" if wide else ""
        return Estimate(10 + weights * (2 * tokens + 40) / 2e10, disk, 5 * weights, note)

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
        limits = Limits(config.max_kl_f32, config.max_kl_f16, config.min_top1, config.max_kl)
        verify_deployment(ctx.out, limits, ctx.one("model").model().path)


def _second_grid(ctx: PreflightContext[ExportConfig]) -> None:
    """Raise PreflightError where weights trained on one grid would be put on another, or where no file holds them."""
    from lmdistill.quantization.plan import PRESETS
    from lmdistill.quantization.planned import lies_on

    preset = lies_on(ctx.one("model"))
    if preset is None:
        return
    if preset not in PRESETS:
        raise PreflightError(
            f"stage '{ctx.name}': a GGUF file cannot hold a model trained on grid '{preset}'",
            fix="export to the runtime that grid is for, or train on one of " + ", ".join(PRESETS),
        )
    if other := [name for name in ctx.config.formats if FORMATS[name].quantized and name != preset]:
        raise PreflightError(
            f"stage '{ctx.name}': `formats: {other[0]}` would quantise a model a second time",
            why=f"its weights were trained on '{preset}' and lie there",
            fix=f"set `formats: [{preset}]` (f32 and f16 may stand beside it), or export the model before `quantize`",
        )


def _needs_text(ctx: PreflightContext[ExportConfig]) -> None:
    """Raise PreflightError where an importance matrix is asked for without text."""
    if ctx.config.imatrix_tokens and not ctx.inputs.get("corpus"):
        raise PreflightError(
            f"stage '{ctx.name}': `imatrix_tokens` needs a corpus", fix="name the corpus stage in `from` too"
        )


def _checks(ctx: PreflightContext[ExportConfig]) -> Iterator[Any]:
    """What can be tried before anything runs; each raises where the export would fail."""
    from lmdistill.deployment.architectures import architecture_of
    from lmdistill.deployment.llama_cpp_runtime import llama_library
    from lmdistill.deployment.planned import config_ahead
    from lmdistill.deployment.vocabulary import check_tokenizer

    yield llama_library
    yield lambda: _second_grid(ctx)
    yield lambda: _needs_text(ctx)
    if (config := config_ahead(ctx, "model")) is not None:
        yield lambda: architecture_of(config)
    if ctx.teacher is not None and (ctx.teacher.path / "tokenizer.json").is_file():
        folder = ctx.teacher.path
        yield lambda: check_tokenizer(folder)
