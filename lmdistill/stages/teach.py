"""teach: the teacher's top-K log-probs of every token of the corpus, once, into a cache that proves itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from lmdistill.asset_spec import ModelSpec
from lmdistill.errors import IntegrityError, LmdistillError, PreflightError
from lmdistill.pipeline.stage import (
    AddedKey,
    Estimate,
    Input,
    PreflightContext,
    Runtime,
    RuntimeKey,
    Stage,
    StageConfig,
    StageContext,
)
from lmdistill.signals.variants import TOOLS
from lmdistill.teachers.registry import ENGINES, check_engine, create_engine, tools_of
from lmdistill.teachers.sampling_keys import SAMPLED, stray_keys
from lmdistill.teachers.speaker import ROLE, planned_speaker, speaker
from lmdistill.teachers.token_maps import check_same_tokens, real_vocabulary, token_map
from lmdistill.teachers.vllm_options import EndpointOptions, VllmOptions

if TYPE_CHECKING:
    from lmdistill.corpus.format import CorpusReader
    from lmdistill.signals.format import Manifest
    from lmdistill.signals.shard_work import Executor
    from lmdistill.teachers.engine import EngineOptions

CPU_FLOPS = 2e11  # of two cores with AVX512-BF16, measured: 860 tokens a second of a 135 M teacher


class TeachConfig(StageConfig):
    """What is kept of the teacher's predictions, and how they are computed."""

    teacher: Annotated[Literal["recipe", "model"], AddedKey()] = Field(
        default="recipe", description="who speaks: the recipe's teacher, or the model of an earlier stage (`from:`)"
    )
    k: Annotated[int, Field(ge=1, le=65_536)] = Field(default=32, description="log-probs kept of each token's teacher")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="the teacher's weights and logits")
    load_in: Annotated[Literal["nf4", "int8"] | None, AddedKey()] = Field(
        default=None,
        description="the teacher's linear layers in 4 or 8 bits (bitsandbytes): less memory, another teacher; what it "
        "loses is measured on `parity_rows` rows, for which it is first loaded whole on the CPU",
    )
    engine: str = Field(default="transformers", description="what runs the teacher (lmdistill/teachers/registry.py)")
    splits: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("train",), description="splits of the corpus to score"
    )
    top_p: Annotated[float | None, Field(gt=0, lt=1), AddedKey()] = Field(
        default=None, description="keep of each token's k only the fewest that hold this mass; null: always k"
    )
    k_min: Annotated[int, Field(ge=1), AddedKey()] = Field(default=1, description="with `top_p`: keep at least so many")
    variant: str = Field(default="mmap", description="how the cache is stored (lmdistill/signals/variants)")
    shard_rows: Annotated[int, Field(ge=1)] = Field(
        default=256, description="corpus rows in a shard: what a killed run loses at most; more for fast devices"
    )
    batch_rows: Annotated[int, Field(ge=1)] = Field(
        default=8, description="rows in one forward; semantic, as on GPUs the last bits depend on a batch's shape"
    )
    ensemble: Annotated[tuple[ModelSpec, ...], AddedKey()] = Field(
        default=(), description="more teachers of the same vocabulary: the mean of all probabilities is kept"
    )
    ensemble_weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AddedKey()] = Field(
        default=(), description="shares in that mean, the recipe's teacher first; empty: equal"
    )

    vllm: Annotated[VllmOptions, RuntimeKey()] = Field(default=VllmOptions(), description="how `engine: vllm` runs")
    endpoint: Annotated[EndpointOptions | None, RuntimeKey()] = Field(
        default=None, description="the server that `engine: vllm_server` asks"
    )
    parity_rows: Annotated[int, Field(ge=0), AddedKey()] = Field(
        default=2, description="corpus rows that prove other engines against transformers in float32; 0: no proof"
    )
    parity_bound: Annotated[float | None, Field(gt=0), AddedKey()] = Field(
        default=None, description="largest |Δ log-prob| of that proof, in nats; null: what the precision explains"
    )

    draws: Annotated[Annotated[int, Field(ge=1, le=255)] | None, AddedKey()] = Field(
        default=None, description="`variant: sampled`: ids drawn a token; null: 24, of which about 12 are distinct"
    )
    proposal_temperature: Annotated[Annotated[float, Field(ge=0.25, le=2)] | None, AddedKey()] = Field(
        default=None, description="with `draws`: they come from p^t, weighted by p/p^t; null: 1"
    )
    draw_seed: Annotated[Annotated[int, Field(ge=0)] | None, AddedKey()] = Field(
        default=None, description="with `draws`: which are drawn; null: 0"
    )

    hidden_layers: Annotated[tuple[int, ...], AddedKey()] = Field(
        default=(), description="hidden states to keep too: 0 the embeddings, n block n's output, −1 the last, normed"
    )
    hidden_dtype: Annotated[Literal["float16", "int8"], AddedKey()] = Field(
        default="float16", description="how they are kept; int8 has a scale a token and layer, off by 0.4% of its peak"
    )

    @model_validator(mode="after")
    def _floor_below_cap(self) -> TeachConfig:
        if self.k_min > (self.k if self.top_p is not None else 1):
            raise ValueError(f"k_min is {self.k_min}: it goes with `top_p`, and is at most k ({self.k})")
        return self

    @model_validator(mode="after")
    def _draws_go_with_sampled(self) -> TeachConfig:
        stray = stray_keys(self, TeachConfig.model_fields)
        if stray:
            raise ValueError(stray)
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> TeachConfig:
        teachers, weights = 1 + len(self.ensemble), len(self.ensemble_weights)
        if weights not in (0, teachers) or (weights and not self.ensemble):
            raise ValueError(f"ensemble_weights has {weights} weights for {teachers} teachers")
        return self


class TeachStage(Stage[TeachConfig]):
    """corpus → signals."""

    name = "teach"
    version = 4
    Config = TeachConfig
    inputs = (Input("corpus", ("corpus",)),)
    output = "signals"

    def inputs_for(self, config: TeachConfig) -> tuple[Input, ...]:
        """A model that speaks in the teacher's place."""
        return self.inputs if config.teacher == "recipe" else (*self.inputs, Input(ROLE, ("model",)))

    def uses_teacher(self, config: TeachConfig) -> bool:
        """The recipe's teacher speaks here, unless a model does."""
        return config.teacher == "recipe"

    def tools_used(self, config: TeachConfig) -> tuple[str, ...]:
        """Those of the engine and of the variant."""
        low_bits = ("bitsandbytes",) if config.load_in else ()
        return tools_of(config.engine) + TOOLS.get(config.variant, ()) + low_bits

    def preflight(self, ctx: PreflightContext[TeachConfig]) -> list[LmdistillError]:
        """Engine, variant, K against the vocabulary, token maps, teachers, hidden states, splits, the Ray cluster."""
        from lmdistill.teachers.planned import check_planned_bits, check_planned_ensemble, check_planned_hidden

        ctx = replace(ctx, teacher=planned_speaker(ctx))
        errors: list[LmdistillError] = []
        checks = (
            _check_engine,
            _check_variant,
            _check_tokens,
            check_planned_ensemble,
            check_planned_hidden,
            check_planned_bits,
            _check_splits,
            _check_ray,
        )
        for check in checks:
            try:
                check(ctx)
            except LmdistillError as error:
                errors.append(error)
        return errors

    def estimate(self, ctx: PreflightContext[TeachConfig]) -> Estimate:
        """Disk from the corpus' rows, memory and time from the teacher's parameters."""
        ctx = replace(ctx, teacher=planned_speaker(ctx))
        tokens, disk, memory, seconds = _tokens(ctx), None, None, None
        if ctx.teacher is not None:
            from lmdistill.teachers.planned import planned_load

            parameters, memory = planned_load(ctx, ctx.teacher)
            if tokens is not None:
                from lmdistill.signals import variant as variants
                from lmdistill.teachers.planned import layout_of

                layout = layout_of(ctx.config, 1, real_vocabulary(token_map(ctx.teacher.path)), ctx.teacher)
                disk = tokens * (variants.get(layout.variant).bytes_bound(layout) + layout.beside)
                seconds = tokens * 2 * parameters / CPU_FLOPS
        note = "time on two CPU cores in bfloat16; a GPU takes far less"
        if ctx.teacher is None and tokens is not None:
            from lmdistill.teachers.planned import note_without_teacher

            note = note_without_teacher(ctx.config, tokens)
        return Estimate(seconds, disk, memory, note)

    def run(self, ctx: StageContext[TeachConfig]) -> dict[str, Any]:
        """Score what is missing; figures of each split."""
        from lmdistill.corpus.format import CorpusReader
        from lmdistill.signals.capture import Capture
        from lmdistill.teachers.ensemble_members import bring_members, check_members
        from lmdistill.teachers.opening import open_engine
        from lmdistill.teachers.planned import layout_of, who_speaks
        from lmdistill.teachers.proving import proof_of

        ctx = replace(ctx, teacher=speaker(ctx))
        corpus, teacher = CorpusReader(ctx.one("corpus").out), ctx.need_teacher()
        corpus.verify()
        _check_k(ctx.config.k, corpus.meta.vocab_size)
        check_same_tokens(token_map(corpus.tokenizer_folder), token_map(teacher.path), "the corpus", "the teacher")
        others = bring_members(ctx.config.ensemble, ctx.progress)
        check_members(teacher, others)
        manifest = Capture(
            folder=ctx.out,
            corpus=corpus,
            splits=ctx.config.splits,
            layout=layout_of(ctx.config, corpus.meta.sequence_length, corpus.meta.vocab_size, teacher),
            teacher=who_speaks(ctx.config, [teacher, *others], _version(ctx.config)),
            open_engine=partial(
                open_engine,
                ctx.config.engine,
                teacher,
                _options(ctx, corpus),
                tuple(others),
                ctx.config.ensemble_weights,
                proof_of(ctx, corpus, [teacher, *others]),
            ),
            shard_rows=ctx.config.shard_rows,
            batch_rows=ctx.config.batch_rows,
            progress=ctx.progress,
            executor=_executor(ctx.runtime),
            teacher_files=tuple(path for model in (teacher, *others) for path in (model.path, model.gguf) if path),
        ).run()
        return _figures(ctx, manifest)

    def verify(self, ctx: StageContext[TeachConfig], metrics: dict[str, Any]) -> None:
        """Read everything again: bytes, alignment, and figures that a teacher can have."""
        from lmdistill.signals.inspect import verify

        problems = verify(ctx.out)
        if problems:
            raise IntegrityError(
                f"the teacher cache is not what was written: {len(problems)} problems",
                why="\n       ".join(problems[:4]),
            )
        for split, figures in metrics["splits"].items():
            mass, nll = figures["head_mass"], figures["teacher_nll"]
            if mass is None or not 0 < mass <= 1 or (nll is not None and not (math.isfinite(nll) and nll >= 0)):
                raise IntegrityError(
                    f"no teacher can have said this of split '{split}'", why=f"head mass {mass}, loss {nll} nats"
                )


def _figures(ctx: StageContext[TeachConfig], manifest: Manifest) -> dict[str, Any]:
    """What the stage says of its cache: the first split's figures, the engine's proof, those of every split."""
    from lmdistill.teachers.proving import record_of

    statistics = {name: split.statistics for name, split in manifest.splits.items()}
    first = statistics[ctx.config.splits[0]]
    summary = {name: first[name] for name in ("bytes_per_token", "head_mass", "teacher_nll")}
    summary["tokens"] = sum(int(figures["tokens"] or 0) for figures in statistics.values())
    proven = {"parity": json.loads(record_of(ctx).read_text())} if record_of(ctx).exists() else {}
    return {"k": manifest.layout.k, **summary, **proven, "splits": statistics, "digest": manifest.digest}


def _version(config: TeachConfig) -> str:
    if not ENGINES[config.engine].server:
        return create_engine(config.engine).version()
    from lmdistill.teachers.vllm_server import served_version

    return served_version(config.endpoint)


def _options(ctx: StageContext[TeachConfig], corpus: CorpusReader) -> EngineOptions:
    from lmdistill.teachers.engine import EngineOptions
    from lmdistill.teachers.planned import hidden_of

    hidden = hidden_of(ctx.config, ctx.need_teacher())
    return EngineOptions(
        k=ctx.config.k,
        vocab_size=corpus.meta.vocab_size,
        precision=ctx.config.precision,
        load_in=ctx.config.load_in,
        device=ctx.runtime.device if ctx.runtime.ray is None else ctx.runtime.device.partition(":")[0],  # Ray picks N
        threads=ctx.runtime.threads,
        isolate=corpus.meta.packing == "isolate",
        row_tokens=corpus.meta.sequence_length,
        hidden_layers=hidden.layers if hidden else (),
        vllm=ctx.config.vllm,
        endpoint=ctx.config.endpoint,
    )


def _executor(runtime: Runtime) -> Executor:
    """Who scores: this process, or workers on a Ray cluster."""
    if runtime.ray is None:
        from lmdistill.signals.shard_work import InProcess

        return InProcess()
    from lmdistill.signals.ray_capture import RayExecutor

    return RayExecutor(runtime.ray, runtime.ray_workers, runtime.threads, runtime.device)


def _check_ray(ctx: PreflightContext[TeachConfig]) -> None:
    from lmdistill.signals.ray_cluster import check

    check(ctx.runtime.ray)


def _check_engine(ctx: PreflightContext[TeachConfig]) -> None:
    check_engine(ctx.config.engine)
    if ENGINES[ctx.config.engine].server:
        from lmdistill.teachers.vllm_server import check_server

        check_server(ctx.config.endpoint)
    if ctx.teacher is not None:
        from lmdistill.teachers.planned import precision_of

        precision_of(ctx.config, ctx.teacher)


def _check_variant(ctx: PreflightContext[TeachConfig]) -> None:
    from lmdistill.signals import variant as variants

    variants.get(ctx.config.variant)
    if ctx.config.variant == SAMPLED and ctx.config.engine in ENGINES:
        from lmdistill.teachers.draws import check_draws

        check_draws(ctx.config.engine)


def _check_tokens(ctx: PreflightContext[TeachConfig]) -> None:
    """K against the real vocabulary, and the corpus' token map against the teacher's, as far as both are here."""
    if ctx.teacher is None:
        return
    ours = token_map(ctx.teacher.path)
    _check_k(ctx.config.k, real_vocabulary(ours))
    from lmdistill.corpus.tokenizers import planned_tokenizer

    folder = planned_tokenizer(ctx.one("corpus"), ctx.teacher)
    if folder not in (None, ctx.teacher.path):
        check_same_tokens(token_map(folder), ours, "the corpus' tokenizer", "the teacher's")


def _check_k(k: int, vocabulary: int) -> None:
    if k > vocabulary:
        raise PreflightError(
            f"k is {k}, the teacher's vocabulary has {vocabulary} tokens", fix=f"set k to {vocabulary} or less"
        )


def _check_splits(ctx: PreflightContext[TeachConfig]) -> None:
    corpus, wanted = ctx.one("corpus"), ctx.config.splits
    if corpus.artefact is None:
        known = ["train", "valid", *(["test"] if getattr(corpus.config, "test_fraction", 0) else [])]
    else:
        known = [*json.loads((corpus.artefact.out / "corpus.json").read_text())["splits"]]
    unknown = [split for split in wanted if split not in known]
    if unknown or len(set(wanted)) < len(wanted):
        raise PreflightError(
            f"stage '{ctx.name}': splits {list(wanted)} cannot be scored",
            why=f"the corpus has {', '.join(known)}; each can be named once",
            fix="correct `splits`",
        )


def _tokens(ctx: PreflightContext[TeachConfig]) -> int | None:
    """Tokens to score, padding included: exact where the corpus is there, else its caps."""
    corpus = ctx.one("corpus")
    if corpus.artefact is not None:
        meta = json.loads((corpus.artefact.out / "corpus.json").read_text())
        rows: list[int] = [meta["splits"][name]["rows"] for name in ctx.config.splits]
        return sum(rows) * int(meta["sequence_length"])
    caps: list[int | None] = [
        getattr(corpus.config, "train_tokens" if name == "train" else "valid_tokens", None)
        for name in ctx.config.splits
    ]
    return sum(cap for cap in caps if cap is not None) if None not in caps else None
