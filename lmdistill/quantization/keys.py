"""The keys of a student that learns on the grid it ships on: quantized distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_OPTIONS = {
    "uniform": {"bits", "bucket", "stochastic", "share_bits"},
    "points": {"bits", "bucket", "points_of", "share_bits"},
    "8da4w": {"group"},
}


class QuantizeKeys(BaseModel):
    """`quantize:` of `distill`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: str = Field(
        default="q4_0",
        description="llama.cpp's q4_0, q4_1, q5_0, q8_0, q4_k_m, q6_k; 8da4w (ExecuTorch); uniform; points (learned)",
    )
    embeddings: str | None = Field(
        default=None, description="grid of the embeddings, or f16, f32; null: as the file type has it"
    )
    head: str | None = Field(default=None, description="the same for the head; a tied one is the embeddings' matrix")
    keep: tuple[str, ...] = Field(default=(), description="globs of tensors that are put on no grid")
    bits: Annotated[int, Field(ge=1, le=8)] | None = Field(
        default=None, description="`grid: uniform`, `points`: bits a weight; null: 4"
    )
    bucket: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="`grid: uniform`, `points`: weights that share a range; null: 64 and 256"
    )
    stochastic: bool = Field(default=False, description="`grid: uniform`: rounding at random, right on average")
    points_of: Literal["tensor", "bucket"] | None = Field(
        default=None, description="`grid: points`: what has points of its own; null: each tensor"
    )
    share_bits: Literal["linear", "logarithmic"] | None = Field(
        default=None,
        description="`grid: uniform`, `points`: `bits` are the mean, and tensors with larger gradients get more: in "
        "proportion, or one bit a doubling; null: all the same",
    )
    group: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="`grid: 8da4w`: weights that share a scale; null: 32"
    )
    start: Literal["reference", "fitted", "weighted", "compensated"] = Field(
        default="reference",
        description="reference: the runtime's own scales; fitted: the best of some factors of those, by squared error; "
        "weighted: with inputs' mean squares; compensated: besides, weights rounded so that others make good (GPTQ)",
    )
    start_tokens: Annotated[int, Field(ge=1)] = Field(
        default=16_384, description="tokens of training text that inputs are measured on, for the last two"
    )
    scales: Literal["follow", "fixed", "learned"] = Field(
        default="follow",
        description="of blocks, in training: found anew in every step (K-quants' take too long and are kept), kept "
        "from the start, trained",
    )
    scale_lr: Annotated[float, Field(gt=0)] = Field(
        default=1e-3, description="`scales: learned`: their peak step, relative to their root mean square"
    )
    self_teacher: Literal["frozen", "moving"] | None = Field(
        default=None,
        description="losses that run a teacher (full_…, intermediate) learn from the student in full precision: as it "
        "was, a second copy; or as it is, the same weights without their grid; null: from the recipe's teacher",
    )

    @model_validator(mode="after")
    def _options_of_the_grid(self) -> QuantizeKeys:
        allowed = _OPTIONS.get(self.grid, set())
        set_keys = {key for keys in _OPTIONS.values() for key in keys if getattr(self, key)}
        if stray := sorted(set_keys - allowed):
            raise ValueError(f"{stray[0]}: grid '{self.grid}' has no such option")
        return self

    @model_validator(mode="after")
    def _points_are_kept(self) -> QuantizeKeys:
        if self.grid == "points" and (self.scales == "follow" or self.start != "reference"):
            raise ValueError("grid: points begins at percentiles and keeps its points: `scales: learned`, or fixed")
        return self

    @model_validator(mode="after")
    def _scales_of_the_start(self) -> QuantizeKeys:
        if self.start != "reference" and self.scales == "follow":
            raise ValueError(f"start: {self.start} chooses scales, and `scales: follow` forgets them; fixed or learned")
        if self.self_teacher == "moving" and self.start == "compensated":
            raise ValueError("self_teacher: moving would teach what `start: compensated` has moved; frozen")
        if self.stochastic and self.start == "compensated":
            raise ValueError("start: compensated rounds each weight once; drop `stochastic`")
        return self

    def options(self) -> dict[str, Any]:
        """Those of the grid."""
        given = {"bits": self.bits, "bucket": self.bucket, "stochastic": self.stochastic, "group": self.group}
        return {key: value for key, value in (given | {"of": self.points_of}).items() if value}
