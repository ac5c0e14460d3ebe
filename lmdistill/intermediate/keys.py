"""The keys of one entry of distill's `intermediate`: which loss, on which layers, with which weight."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LayerMap = Literal["last", "uniform", "grown"]
COMMON = ("loss", "weight", "layers", "live")  # what every loss reads


class IntermediateKeys(BaseModel):
    """One intermediate loss."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    loss: str = Field(description="by name, see below")
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="of its mean over layers, beside the others")
    layers: LayerMap | dict[int, int] = Field(
        default="last",
        description="student's layer: teacher's, 0 the embeddings, n block n, −1 the last; or last, uniform, grown",
    )
    live: bool = Field(
        default=False, description="the teacher runs beside the student; else its states come from the cache"
    )
    relative: bool = Field(
        default=True, description="squared error relative to the squared length of the teacher's state; false: plain"
    )
    projection: bool = Field(
        default=False, description="learn a linear map from the student's states even where the widths are equal"
    )
    relations: Annotated[tuple[Literal["q", "k", "v"], ...], Field(min_length=1)] = Field(
        default=("q", "k", "v"), description="relations of queries, keys, values"
    )
    relation_heads: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="heads that both sides are split into anew; null: the teacher's"
    )
    block_input: Literal["student", "teacher"] = Field(
        default="student", description="what a block is given: what the blocks below give on, or the teacher's state"
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="α of the bound on mutual information: 1 the most samples, 0 the learned baseline"
    )
    critic_width: Annotated[int, Field(ge=2)] = Field(default=128, description="width of the learned critic")
    group: Annotated[int, Field(ge=3)] = Field(
        default=256, description="positions of a row that are each other's negative samples"
    )
    head_lr: Annotated[float, Field(gt=0)] = Field(
        default=1e-3, description="peak step of what is learned beside the student (projection, critic), absolute"
    )

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher has to run: asked for, or no cache holds what the loss compares."""
        return self.live or self.loss.startswith("relation")
