"""evaluate: quality, parity and speed of the teacher and of everything made from it, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmdistill.corpus.config import SPLITS
from lmdistill.errors import IntegrityError, LmdistillError, PreflightError, nearest
from lmdistill.evaluation.gates import COMPARED, SPEED, Gate
from lmdistill.evaluation.suites import load_suite
from lmdistill.pipeline.stage import (
    Estimate,
    Input,
    ModelRef,
    Planned,
    PreflightContext,
    Stage,
    StageConfig,
    StageContext,
)

TEACHER = "teacher"
LOGIT_COPIES = 3  # of a sequence in memory at once: the model's, its log-probabilities, the predictions that count
PACED_WEIGHTS = 2.7e8  # bytes of the model whose pace `estimate` knows
REFERENCES = 2  # on disk at once: the teacher's and one parent's


class SpeedConfig(BaseModel):
    """Sizes of the device benchmarks, as llama-bench's `-p`, `-n` and `-r`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill: Annotated[int, Field(ge=1)] = Field(default=512, description="tokens of the prompt that is read at once")
    decode: Annotated[int, Field(ge=1)] = Field(default=128, description="tokens that are read one at a time")
    repeats: Annotated[int, Field(ge=1)] = Field(default=5, description="interleaved rounds, after one warm-up")


class EvaluateConfig(StageConfig):
    """Keys of `evaluate`; those a suite sets are its defaults."""

    suite: str = Field(default="default", description="a file in eval/suites by name, or the path of a .yaml file")
    split: str = Field(default="valid", description="the corpus split to score on")
    tokens: Annotated[int, Field(ge=1)] = Field(default=8192, description="at most this many tokens are scored")
    metrics: tuple[Literal["kl", "speed"], ...] = Field(
        default=("kl", "speed"), description="beside NLL and bits a byte: divergence from teacher and parent, speed"
    )
    speed: SpeedConfig = Field(default_factory=SpeedConfig, description="sizes of the device benchmarks")
    checkpoint_speed: bool = Field(default=False, description="time checkpoints in transformers too (slow)")
    gates: tuple[Gate, ...] = Field(default=(), description="promises about the ladder; broken ones fail the run")

    @model_validator(mode="before")
    @classmethod
    def _with_suite(cls, given: Any) -> Any:
        """Lay the given keys over the suite's, so that the suite's contents are part of the fingerprint."""
        if not isinstance(given, dict) or not isinstance(given.get("suite", "default"), str):
            return given
        merged = {**load_suite(given.get("suite", "default")), **given}
        suite_speed, own_speed = load_suite(given.get("suite", "default")).get("speed"), given.get("speed")
        if isinstance(suite_speed, dict) and isinstance(own_speed, dict):
            merged["speed"] = {**suite_speed, **own_speed}
        return merged


class EvaluateStage(Stage[EvaluateConfig]):
    """Scores and times every artefact of the recipe; `gates` decide whether the run is good enough."""

    name = "evaluate"
    version = 3
    Config = EvaluateConfig
    inputs = (
        Input("corpus", ("corpus",)),
        Input("models", ("student", "model"), many=True, optional=True),
        Input("deployments", ("deployment",), many=True, optional=True),
        Input("signals", ("signals",), optional=True),
    )
    output = "report"
    uses_names = True
    tools = ("torch", "transformers", "llama-cpp-python")

    def uses_teacher(self, config: EvaluateConfig) -> bool:
        """The teacher is the ladder's first row."""
        return True

    def preflight(self, ctx: PreflightContext[EvaluateConfig]) -> list[LmdistillError]:
        """Runtimes, split, each file's model, gates' names; disk and memory are checked by the pipeline."""
        from lmdistill.evaluation.ptq_rows import missing_ptq

        found = [*_missing_runtimes(ctx), *_missing_split(ctx), *_missing_models(ctx), *_wrong_gates(ctx)]
        found += _short_contexts(ctx)
        return [*found, *missing_ptq(ctx.name, ctx.inputs.get("deployments", ()))]

    def estimate(self, ctx: PreflightContext[EvaluateConfig]) -> Estimate:
        """Scoring at the pace of a small model on two cores, and the scratch references."""
        files = sum(len(_formats(planned.config)) or 1 for planned in ctx.inputs.get("deployments", ()))
        rows, speed = 1 + len(ctx.inputs.get("models", ())) + files, ctx.config.speed
        teacher = ctx.teacher.path if ctx.teacher is not None else None
        here = teacher is not None and (teacher / "config.json").exists()
        weights = sum(file.stat().st_size for file in teacher.glob("*.safetensors")) if teacher and here else 0
        larger = max(1.0, weights / PACED_WEIGHTS)  # files are mostly of students: not more than this
        seconds = larger * rows * ctx.config.tokens / 400
        if "speed" in ctx.config.metrics:
            seconds += larger * files * (speed.repeats + 1) * (speed.prefill / 600 + speed.decode / 80)
        note = f"{rows} rows of the ladder; " + (
            "time at most, on two cores" if here else "time: known with the teacher"
        )
        return Estimate(seconds if here else None, _reference_bytes(ctx), _memory_bytes(ctx), note)

    def run(self, ctx: StageContext[EvaluateConfig]) -> dict[str, Any]:
        """Score, then time, then write evaluation.json; the metrics are the deterministic half."""
        from lmdistill.evaluation.run import evaluate

        return evaluate(ctx)

    def verify(self, ctx: StageContext[EvaluateConfig], metrics: dict[str, Any]) -> None:
        """Every gate of the recipe was held against the ladder; broken ones fail the run once the report is there."""
        from lmdistill.evaluation.record import FILE

        held = [result["gate"] for result in json.loads((ctx.out / FILE).read_text())["gates"]]
        if held != [gate.render() for gate in ctx.config.gates]:
            raise IntegrityError(f"stage '{ctx.name}' wrote other gates than the recipe has", why=", ".join(held))


def _missing_runtimes(ctx: PreflightContext[EvaluateConfig]) -> Iterable[LmdistillError]:
    from lmdistill.evaluation.runtimes import runtime_class

    files = {runtime for planned in ctx.inputs.get("deployments", ()) for runtime in _runtimes(planned)}
    for runtime in ("transformers", *sorted(files)):
        fix = runtime_class(runtime).missing()
        if fix:
            yield PreflightError(f"stage '{ctx.name}' needs {runtime}, which is not installed", fix=fix)


def _missing_split(ctx: PreflightContext[EvaluateConfig]) -> Iterable[LmdistillError]:
    """A split that the corpus to come will not have."""
    wanted = ctx.config.split
    for corpus in ctx.inputs.get("corpus", ()):
        if wanted not in SPLITS and not getattr(corpus.config, "splits", None):
            yield PreflightError(
                f"stage '{ctx.name}': a corpus has no split '{wanted}'{nearest(wanted, SPLITS)}",
                fix=f"set `split` to one of {', '.join(SPLITS)}",
            )
        key = f"{ctx.config.split}_fraction"  # of the splits that are held out
        if getattr(corpus.config, key, None) == 0:
            yield PreflightError(
                f"stage '{ctx.name}': the corpus '{corpus.name}' will have no split '{ctx.config.split}'",
                why=f"its {key} is 0",
                fix=f"raise `{key}` of '{corpus.name}', or name another `split`",
            )
        cached = getattr(corpus.config, "splits", None)  # of a teacher cache that is there already
        if cached and ctx.config.split not in cached:
            yield PreflightError(
                f"stage '{ctx.name}': the corpus '{corpus.name}' will have no split '{ctx.config.split}'",
                why=f"its cache has {', '.join(cached)}",
                fix="import with --valid-fraction, or name another `split`",
            )


def _missing_models(ctx: PreflightContext[EvaluateConfig]) -> Iterable[LmdistillError]:
    """Exports whose model is not a row of the ladder, so that there is nothing to compare their files with."""
    rows = {planned.fingerprint for planned in ctx.inputs.get("models", ())}
    for export in ctx.inputs.get("deployments", ()):
        for model in export.inputs.get("model", ()):
            if model.name != TEACHER and model.fingerprint not in rows:
                what = f"the files of '{export.name}' come from '{model.name}', which is not evaluated"
                yield PreflightError(
                    f"stage '{ctx.name}': {what}",
                    fix=f"add '{model.name}' to its `from:`, or leave `from:` out",
                )


def _formats(config: Any) -> list[str]:
    """The formats that a planned export will write, where its config says so."""
    return [str(name) for name in getattr(config, "formats", ())]


def _runtimes(planned: Planned) -> set[str]:
    """The runtimes of the files that a planned export will write; llama.cpp where its config does not say."""
    from lmdistill.deployment.targets import target_of

    formats = _formats(planned.config)
    return {target_of(name).runtime for name in formats} if formats else {"llama.cpp"}


def _short_contexts(ctx: PreflightContext[EvaluateConfig]) -> Iterable[LmdistillError]:
    """Exports whose programs will hold fewer positions than are scored or timed at once."""
    corpus, speed = ctx.ancestor("corpus"), ctx.config.speed
    wanted = [int(getattr(corpus.config, "sequence_length", 0)) if corpus else 0]
    wanted += [speed.prefill, speed.decode] if "speed" in ctx.config.metrics else []
    for export in ctx.inputs.get("deployments", ()):
        context = getattr(export.config, "context", None)
        if context is not None and context < max(wanted) and "executorch" in _runtimes(export):
            yield PreflightError(
                f"stage '{ctx.name}' needs {max(wanted)} positions, the programs of '{export.name}' hold {context}",
                fix=f"raise `context` of '{export.name}', or lower `speed`",
            )


def _wrong_gates(ctx: PreflightContext[EvaluateConfig]) -> Iterable[LmdistillError]:
    """Gates on rows that the ladder will not have, or on figures that are not measured."""
    exports = ctx.inputs.get("deployments", ())
    rows = {TEACHER, *(planned.name for planned in ctx.inputs.get("models", ()))}
    rows |= {f"{planned.name}/{name}" for planned in exports for name in _formats(planned.config)}
    for gate in ctx.config.gates:
        for row in gate.rows:
            if row not in rows:
                yield PreflightError(
                    f"stage '{ctx.name}': a gate reads '{row}', which the ladder will not have{nearest(row, rows)}",
                    why=f"its rows are {', '.join(sorted(rows))}",
                    fix="correct the gate",
                )
        for group, figures in (("kl", COMPARED), ("speed", SPEED)):
            for metric in gate.metrics:
                if metric in figures and group not in ctx.config.metrics:
                    yield PreflightError(
                        f"stage '{ctx.name}': a gate reads '{metric}', which is not measured",
                        fix=f"add `{group}` to `metrics`",
                    )


def _reference_bytes(ctx: PreflightContext[EvaluateConfig]) -> int | None:
    """Scratch space for full-vocabulary references; None while the teacher is not on this machine."""
    if "kl" not in ctx.config.metrics:
        return 0
    if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
        return None
    from lmdistill.evaluation.references import reference_bytes

    return REFERENCES * reference_bytes(ctx.config.tokens, _vocabulary(ctx.teacher))


def _vocabulary(teacher: ModelRef) -> int:
    return int(json.loads((teacher.path / "config.json").read_text())["vocab_size"])


def _memory_bytes(ctx: PreflightContext[EvaluateConfig]) -> int | None:
    """The teacher's weights and three copies of a sequence's logits; None while either is not known."""
    corpus = ctx.ancestor("corpus")
    length = getattr(corpus.config, "sequence_length", None) if corpus else None
    if length is None or ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
        return None
    weights = sum(file.stat().st_size for file in ctx.teacher.path.glob("*.safetensors"))
    return weights + LOGIT_COPIES * 4 * int(length) * _vocabulary(ctx.teacher)
