"""export: a model as GGUF files for llama.cpp, each proven against the checkpoint it comes from."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from lmdistill.deployment.formats import FORMATS, fallback_share, known_format
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, Stage, StageConfig, StageContext

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
        config = _model_config(ctx)
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
        verify_deployment(ctx.out, Limits(config.max_kl_f32, config.max_kl_f16, config.min_top1, config.max_kl))


def _config_of(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def _model_config(ctx: PreflightContext[ExportConfig]) -> dict[str, Any] | None:
    """config.json of the model to export, where it is there or the recipe tells what it will be."""
    planned, teacher = ctx.one("model"), _config_of(ctx.teacher.path if ctx.teacher else None)
    if planned.artefact is not None:
        return _config_of(planned.artefact.model().path)
    if planned.stage == "teacher" or teacher is None:
        return teacher
    student = planned if planned.stage == "student" else ctx.ancestor("student")
    if student is None:
        return None
    from lmdistill.deployment.planned import planned_config

    return planned_config(student.config.model_dump(), teacher)


def _checks(ctx: PreflightContext[ExportConfig]) -> Iterator[Any]:
    """What can be tried before anything runs; each raises where the export would fail."""
    from lmdistill.deployment.architectures import architecture_of
    from lmdistill.deployment.llama_cpp_runtime import llama_library
    from lmdistill.deployment.vocabulary import check_tokenizer

    yield llama_library
    if (config := _model_config(ctx)) is not None:
        yield lambda: architecture_of(config)
    if ctx.teacher is not None and (ctx.teacher.path / "tokenizer.json").is_file():
        folder = ctx.teacher.path
        yield lambda: check_tokenizer(folder)
