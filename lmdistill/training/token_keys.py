"""The keys of token weights in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class TokenWeights(BaseModel):
    """Some tokens teach more than others; the mean weight over the counted tokens of a row is 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str = Field(description="what a token's weight comes from, by name, see below")
    of: Literal["both", "kd", "ce"] = Field(
        default="both", description="which loss is weighted: distillation, cross-entropy, or both"
    )
    nats: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="`by: no_outliers`: the most that the teacher may be surprised by a token"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="`by: top_gap`: share of a row's tokens that is trained on"
    )
