"""distill: a student learns from the teacher cache; `loss: ce` is the baseline at equal tokens."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError, LmdistillError, PreflightError, RecipeError
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, Stage, StageContext
from lmdistill.teachers.sampling_keys import SAMPLED
from lmdistill.training.config import DistillConfig

SPLIT = "train"  # what training reads
CPU_FLOPS = 2e11  # operations a second of two laptop cores in bfloat16, measured


class DistillStage(Stage[DistillConfig]):
    """Signals and a student in, a trained model out."""

    name = "distill"
    version = 7
    Config = DistillConfig
    inputs = (Input("signals", ("signals",)), Input("student", ("model", "student")))
    output = "model"
    launches = True
    tools = ("torch", "transformers", "accelerate")

    def inputs_for(self, config: DistillConfig) -> tuple[Input, ...]:
        """A live teacher needs no cache: a corpus will do. Some curricula read more caches, or the corpus."""
        rows = self.inputs[0] if config.needs_cache else Input("signals", ("signals", "corpus"))
        judged, graded = (config.curriculum.judged, config.curriculum.graded) if config.curriculum else (False, False)
        judges = (Input("judges", ("signals",), many=True),) if judged else ()
        corpus = (Input("corpus", ("corpus",)),) if graded else ()
        return (rows, *self.inputs[1:], *judges, *corpus)

    def uses_teacher(self, config: DistillConfig) -> bool:
        """Where it runs beside the student; else only the cache speaks for it."""
        return config.runs_teacher

    def tools_used(self, config: DistillConfig) -> tuple[str, ...]:
        """PEFT and bitsandbytes where the configuration asks for them."""
        from lmdistill.training.extra_checks import extra_packages

        return (*self.tools, *extra_packages(config))

    def choices(self) -> dict[str, dict[str, str]]:
        """The losses, with the keys that each of them reads, and what else goes by name."""
        from lmdistill.curriculum.difficulty import measures
        from lmdistill.curriculum.pacing import pacings
        from lmdistill.intermediate import registry as intermediate
        from lmdistill.losses import registry as losses
        from lmdistill.quantization.wanted import grid_choices
        from lmdistill.training.optimizers import kinds
        from lmdistill.training.schedules import shapes
        from lmdistill.training.token_weights import weightings

        def described(entry: Any) -> str:
            return f"{entry.summary} [{', '.join(entry.options)}]" if entry.options else str(entry.summary)

        return {
            "loss": {name: described(entry) for name, entry in losses.catalogue().items()},
            "intermediate[].loss": {name: described(entry) for name, entry in intermediate.catalogue().items()},
            "shape of a schedule": shapes(),
            "curriculum.difficulty": {name: measure.summary for name, measure in measures().items()},
            "curriculum.pacing": pacings(),
            "token_weights.by": {name: described(entry) for name, entry in weightings().items()},
            "quantize.grid": grid_choices(),
            "optimizer": {name: kind.summary for name, kind in kinds().items()},
        }

    def preflight(self, ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
        """The loss and its keys. (That student and cache share their tokens is the student stage's to check.)"""
        from lmdistill.intermediate.checks import check_intermediate
        from lmdistill.training.extra_checks import check_extras
        from lmdistill.training.grid_checks import check_grids
        from lmdistill.training.launch_checks import check_launch
        from lmdistill.training.loss_checks import check_live_teacher, check_loss
        from lmdistill.training.phase_checks import check_phases

        problems = check_loss(ctx) + check_live_teacher(ctx) + check_phases(ctx) + check_intermediate(ctx)
        problems += check_extras(ctx) + check_launch(ctx) + check_grids(ctx)
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if ctx.config.compile and not (shutil.which(os.environ.get("CXX", "g++")) and header.exists()):
            problems.append(
                PreflightError(
                    f"stage '{ctx.name}': `compile: true` needs g++ and Python's headers, and one of them is missing",
                    why=f"looked for {os.environ.get('CXX', 'g++')} and {header}",
                    fix="install g++ and python3-dev (or set CXX), or set `compile: false`",
                )
            )
        return problems + _unscored_split(ctx) + _wrong_pair(ctx)

    def estimate(self, ctx: PreflightContext[DistillConfig]) -> Estimate:
        """From the planned student's size: six operations a parameter and token; two resume points and the model."""
        from lmdistill.deployment.planned import parameters_by, student_ahead

        corpus = ctx.ancestor("corpus")
        if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
            return Estimate(note="known when the teacher is on this machine")
        teacher = json.loads((ctx.teacher.path / "config.json").read_text())
        shape = student_ahead(ctx, teacher)
        parameters = parameters_by(shape)
        if shape is None or parameters is None:
            return Estimate(note="the student's size is its checkpoint's")
        length = getattr(corpus.config, "sequence_length", 1024) if corpus else 1024
        rows = ctx.config.micro_rows or ctx.config.batch_rows
        per_layer = 34 * shape["hidden_size"] + 6 * shape["intermediate_size"]
        activations = 2 * rows * length * shape["num_hidden_layers"] * per_layer
        logits = 12 * ctx.config.chunk * teacher["vocab_size"]
        at_most = "" if ctx.ancestor("student") else "at most "  # a search chooses it
        operations, memory = _live_load(ctx, teacher, rows * length)
        if ctx.config.quantize:
            operations += 2 * parameters if ctx.config.self_teacher else 0
            memory += 4 * parameters * (2 if ctx.config.self_teacher == "frozen" else 1)
        return Estimate(
            (6 * parameters + operations) * ctx.config.tokens_seen / CPU_FLOPS,
            2 * 12 * parameters + 4 * parameters,
            16 * parameters + activations + logits + memory,
            f"{at_most}{parameters / 1e6:,.0f} M parameters; time on two CPU cores",
        )

    def run(self, ctx: StageContext[DistillConfig]) -> dict[str, Any]:
        """Train, then write the model folder and training.json."""
        import torch

        from lmdistill.assets import cache_dir
        from lmdistill.signals.reader import SignalsReader
        from lmdistill.training.corpus_rows import CorpusRows
        from lmdistill.training.ranks import Ranks
        from lmdistill.training.run import Place, train

        if ctx.runtime.threads:
            torch.set_num_threads(max(1, ctx.runtime.threads // ctx.runtime.processes))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
        source = ctx.one("signals")
        reader = (CorpusRows if source.kind == "corpus" else SignalsReader)(source.out, SPLIT)
        student = ctx.one("student").model()
        place = Place(
            student.path,
            ctx.out / "model",
            ctx.work / "checkpoints",
            ctx.runtime.resolve_device(),
            student.digest,
            ctx.need_teacher() if ctx.config.runs_teacher else None,
            ctx.teacher,
            tuple(judge.out for judge in ctx.inputs.get("judges", ())),
            next((corpus.out for corpus in ctx.inputs.get("corpus", ())), None),
            Ranks.of(ctx.runtime),
        )
        record = train(reader, ctx.config, place, ctx.progress)
        if not ctx.runtime.first:
            return {}
        (ctx.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        return {
            "tokens": record["tokens"],
            "steps": record["steps"],
            "parameters": record["parameters"],
            "final": record["log"][-1] if record["log"] else {},
        }

    def verify(self, ctx: StageContext[DistillConfig], metrics: dict[str, Any]) -> None:
        """It trained, and its loss is a number."""
        import math

        if metrics["steps"] < 1:
            raise IntegrityError(f"stage '{ctx.name}' trained for no step", fix="raise `tokens`")
        final = metrics["final"].get("loss")
        if final is not None and not math.isfinite(final):
            raise IntegrityError(f"the loss of '{ctx.name}' is {final}", fix="lower `lr`, or use `precision: float32`")


def _wrong_pair(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """The loss can learn from the caches it is planned on."""
    from lmdistill.training.pairing import check_pair

    try:
        for planned in ctx.inputs.get("signals", ()):
            sampled = getattr(planned.config, "variant", "") == SAMPLED
            check_pair(ctx.config.loss, sampled, f"the teacher cache of stage '{planned.name}'")
    except RecipeError:
        return []  # no such loss: said already
    except PreflightError as error:
        return [error]
    return []


def _live_load(ctx: PreflightContext[DistillConfig], shape: dict[str, Any], batch_tokens: int) -> tuple[int, int]:
    """(operations a token, bytes of memory) of a teacher that runs beside the student; none where none does."""
    if not ctx.config.runs_teacher or ctx.teacher is None:
        return 0, 0
    from lmdistill.training.live_teacher import live_load

    return live_load(ctx.teacher.path, shape, ctx.config.precision, batch_tokens, ctx.config.chunk)


def _unscored_split(ctx: PreflightContext[DistillConfig]) -> list[LmdistillError]:
    """The cache will have the split that training reads."""
    splits = [getattr(planned.config, "splits", (SPLIT,)) for planned in ctx.inputs.get("signals", ())]
    if all(SPLIT in names for names in splits):
        return []
    return [
        PreflightError(
            f"stage '{ctx.name}' trains on the split '{SPLIT}', which its teacher cache will not have",
            fix=f"add '{SPLIT}' to the teach stage's `splits`",
        )
    ]
