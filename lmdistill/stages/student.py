"""student: a small model to train, grown from the teacher, taken from a checkpoint, or random."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmdistill.asset_spec import AssetSpec
from lmdistill.errors import IntegrityError, LmdistillError, PreflightError
from lmdistill.pipeline.stage import Estimate, Input, PreflightContext, Stage, StageConfig, StageContext


class StudentConfig(StageConfig):
    """Keys of `student`."""

    init: Literal["grow", "random", "checkpoint"] = Field(
        default="grow", description="grow: from the teacher's blocks; random; checkpoint: the model named by `source`"
    )
    architecture: Literal["lfm2", "llama"] = Field(
        default="lfm2", description="lfm2: short convolutions and some attention; llama: attention throughout"
    )
    source: AssetSpec | None = Field(default=None, description="the model to start from, for `init: checkpoint`")
    layers: Annotated[int, Field(ge=1)] = Field(default=20, description="blocks of the student")
    attention_layers: Annotated[int, Field(ge=0)] = Field(
        default=8, description="how many of them attend; the others convolve (lfm2)"
    )
    kernel: Annotated[int, Field(ge=2)] = Field(default=3, description="taps of the short convolution (lfm2)")
    hidden_size: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="width; null: the teacher's (a grown student always has the teacher's)"
    )
    intermediate_size: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="width inside the MLP; null: the teacher's"
    )
    heads: Annotated[int, Field(ge=1)] | None = Field(default=None, description="query heads; null: the teacher's")
    kv_heads: Annotated[int, Field(ge=1)] | None = Field(default=None, description="key heads; null: the teacher's")
    selection_rows: Annotated[int, Field(ge=1)] = Field(
        default=4, description="rows of the corpus on which blocks to leave out are chosen"
    )
    selection_width: Annotated[int, Field(ge=1)] = Field(
        default=4, description="cheapest candidates tried at every step of the choice after the first"
    )
    fit_rows: Annotated[int, Field(ge=1)] = Field(default=48, description="rows on which every block is fitted")
    fit_steps: Annotated[int, Field(ge=0)] = Field(default=30, description="steps of the block-local regression")
    fit_batch_rows: Annotated[int, Field(ge=1)] = Field(default=8, description="rows in a step of it")
    fit_lr: Annotated[float, Field(gt=0)] = Field(
        default=2e-3, description="its step, in units of each tensor's root mean square"
    )
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of matrix products in growing")
    seed: int = Field(default=0, description="of random weights and of the rows in a step")

    @model_validator(mode="after")
    def _consistent(self) -> StudentConfig:
        if self.attention_layers > self.layers:
            raise ValueError(f"attention_layers {self.attention_layers} is more than layers {self.layers}")
        if (self.init == "checkpoint") != (self.source is not None):
            raise ValueError("`source` goes with `init: checkpoint`, and `init: checkpoint` needs it")
        return self


class StudentStage(Stage[StudentConfig]):
    """Corpus (for calibration) and teacher in, an untrained or barely fitted student out."""

    name = "student"
    version = 4  # a checkpoint brings the record of where it lies
    Config = StudentConfig
    inputs = (Input("corpus", ("corpus",)),)
    output = "student"
    tools = ("torch", "transformers")

    def uses_teacher(self, config: StudentConfig) -> bool:
        """A student from a checkpoint has all it needs there."""
        return config.init != "checkpoint"

    def preflight(self, ctx: PreflightContext[StudentConfig]) -> list[LmdistillError]:
        """The teacher can be grown from, and the shape is possible; a checkpoint has the corpus' tokens."""
        if ctx.config.init == "checkpoint":
            _check_checkpoint(ctx)
            return []
        if ctx.teacher is None:
            return []
        from lmdistill.students.shape import problems

        teacher = json.loads((ctx.teacher.path / "config.json").read_text())
        return [PreflightError(f"stage '{ctx.name}': {text}", fix=fix) for text, fix in problems(ctx.config, teacher)]

    def estimate(self, ctx: PreflightContext[StudentConfig]) -> Estimate:
        """From the shapes of teacher and student where one is grown from the other."""
        if ctx.config.init == "checkpoint":
            return Estimate(30, note="disk and memory: the checkpoint's in float32")
        if ctx.teacher is None or not (ctx.teacher.path / "config.json").exists():
            return Estimate(note="known when the teacher is on this machine")
        from lmdistill.deployment.planned import planned_parameters
        from lmdistill.students.cost import of_growing, of_random

        teacher = json.loads((ctx.teacher.path / "config.json").read_text())
        parameters = planned_parameters(ctx.config.model_dump(), teacher)
        if parameters is None:
            return Estimate(note=f"unknown: a {teacher.get('model_type')} has other names for its sizes")
        if ctx.config.init == "random":
            return of_random(parameters)
        length = getattr(ctx.one("corpus").config, "sequence_length", 1024)
        return of_growing(ctx.config, teacher, parameters, length)

    def run(self, ctx: StageContext[StudentConfig]) -> dict[str, Any]:
        """Make the student, save it with the corpus' tokenizer, count its parameters."""
        from lmdistill.students.make import make

        return make(ctx)

    def verify(self, ctx: StageContext[StudentConfig], metrics: dict[str, Any]) -> None:
        """It has as many parameters as its shape says, to the last one."""
        if metrics["parameters"] != metrics["parameters_by_formula"]:
            raise IntegrityError(
                f"the student has {metrics['parameters']:,} parameters, its shape says "
                f"{metrics['parameters_by_formula']:,}",
                fix="report this with the recipe: the formula or the model is wrong",
            )


def _check_checkpoint(ctx: PreflightContext[StudentConfig]) -> None:
    """Raise PreflightError where it has packed integers, or other tokens than the corpus, as far as both are here."""
    from lmdistill.assets import model_available
    from lmdistill.checkpoints import refuse_packed
    from lmdistill.corpus.tokenizers import planned_tokenizer
    from lmdistill.teachers.token_maps import check_same_tokens, token_map

    assert ctx.config.source is not None
    folder, student = planned_tokenizer(ctx.one("corpus"), ctx.teacher), model_available(ctx.config.source)
    if student is not None:
        refuse_packed(student.path, fix="give the checkpoint in full precision that it was made from")
    if folder is None or student is None:
        return
    ours, theirs = f"the student {ctx.config.source.source}", "the corpus"
    fix = "start from a model with the tokenizer of corpus and teacher, or grow one with `init: grow`"
    check_same_tokens(token_map(student.path), token_map(folder), ours, theirs, fix)
